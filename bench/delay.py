"""Joins two network namespaces by a wire of so many milliseconds each way, where the kernel has no ``netem`` for that.

Makes a TUN device with the name ``cuts`` in each, and prints ``ready``. Each packet that leaves one of them comes out
of the other one so much later. The devices are gone when the program ends. For root only.

    python bench/delay.py NAMESPACE NAMESPACE MILLISECONDS
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import queue
import struct
import sys
import threading
import time

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


def open_device(namespace: str) -> int:
    """Make a device in a namespace, and return its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    where = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(where, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(where)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"cuts", IFF_TUN | IFF_NO_PI))
    return device


def delay(source: int, sink: int, seconds: float) -> None:
    """Pass packets on, each so many seconds after it has come."""
    packets: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def write() -> None:
        while True:
            due, packet = packets.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                os.write(sink, packet)
            except OSError:
                # The device is not up, and a packet may be lost.
                continue

    threading.Thread(target=write, daemon=True).start()
    while True:
        try:
            packet = os.read(source, 65536)
        except OSError:
            time.sleep(0.01)
            continue
        packets.put((time.monotonic() + seconds, packet))


def main() -> None:
    """Be the wire."""
    first, second = (open_device(namespace) for namespace in sys.argv[1:3])
    seconds = float(sys.argv[3]) / 1000
    for source, sink in ((first, second), (second, first)):
        threading.Thread(target=delay, args=(source, sink, seconds), daemon=True).start()
    print("ready", flush=True)
    # Until its standard input ends.
    sys.stdin.read()


if __name__ == "__main__":
    main()
