"""Run a program, and end when what it has printed has been read: ``python run_and_wait.py PROGRAM``.

Qwen Code takes a command to be over when its process has ended (``exit``, and not ``close``), and drops what it has not
read by then. Node reaps every process that has ended when any has; so on a busy machine the end of a short program may
come before its output, and the model is told that there was none.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import stat
import struct
import sys
import termios
import time

#: Seconds after which it ends anyway.
PATIENCE = 60.0


def unread(number: int) -> int:
    """Return how many bytes a pipe or a socket holds that its reader has not taken."""
    is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
    request = termios.TIOCOUTQ if is_socket else termios.FIONREAD
    (count,) = struct.unpack("i", fcntl.ioctl(number, request, bytes(4)))
    return int(count)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    try:
        runpy.run_path(sys.argv[1], run_name="__main__")
    finally:
        sys.stdout.flush()
        deadline = time.monotonic() + PATIENCE
        while unread(1) and time.monotonic() < deadline:
            time.sleep(0.01)
