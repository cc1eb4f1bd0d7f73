"""One node of the demo: the command line, in a process that ends when the demo ends, however that happens.

The process's standard input is a pipe whose other end only the demo holds. When the demo ends, even by SIGKILL, the
node reads the end of the pipe. It then stops as it would on SIGTERM, or after a few seconds in any case. This works on
every POSIX system.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Final

from trio_cluster.cli.commands import main

__all__: list[str] = []

#: Seconds that an orphaned node has to stop before it exits at once.
_GRACE: Final = 5.0


def _stop_with_the_demo() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_GRACE)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_the_demo, daemon=True).start()
    sys.exit(main())
