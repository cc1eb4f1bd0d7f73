"""A node of a cluster, as its command line runs it, which ends with whoever started it.

python bench/node.py master 8080 --host 127.0.0.1
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from trio_cluster.cli.commands import main


def end_with_standard_input() -> None:
    """Let this process end when its standard input does: when whoever has started it is gone, in whatever way."""

    def wait() -> None:
        # Not through sys.stdin, whose lock nobody else could take when the process ends.
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_standard_input()
    sys.exit(main())
