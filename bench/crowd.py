"""Many clients of streams in one process, as cheap as Python can have them: one epoll and no tasks.

Opens all streams at once. Prints ``opened`` and for each stream the seconds until its first token, then ``failed N``;
for every line that it reads, ``tokens N``, which is how many have come; and ends when its standard input does. With
``--stamped``, tokens tell when they were made, and for every line it prints ``delays`` and, for each token that has
come since the last one, the seconds from then to here. With ``--by-chance``, they are made at any moment. With
``--tls``, clients speak TLS, and do their handshakes one after the other.

    python bench/crowd.py PORT STREAMS SECONDS-BETWEEN-TOKENS MODEL,MODEL... [--stamped] [--by-chance] [--tls]
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import ssl
import sys
import time

#: Seconds that the slowest stream may take to begin.
PATIENCE = 60.0
MARK = b"data: "
STAMP = re.compile(rb"token@(\d+)")


def request(model: str, every: str) -> bytes:
    """Return what a client sends."""
    message = {"role": "user", "content": f"every {every}"}
    body = json.dumps({"model": model, "stream": True, "messages": [message]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def encrypt(client: socket.socket, port: int) -> ssl.SSLSocket:
    """Connect a client, and return it with TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client.setblocking(True)
    client.connect(("127.0.0.1", port))
    encrypted = context.wrap_socket(client)
    encrypted.setblocking(False)
    return encrypted


def receive(client: socket.socket) -> bytes | None:
    """Return what has come; ``None``: nothing of use, as a part of a record is."""
    data = b""
    try:
        data = client.recv(65536)
        # What was read from the socket, and not returned, makes no socket readable.
        while isinstance(client, ssl.SSLSocket) and client.pending():
            data += client.recv(65536)
    except ssl.SSLWantReadError:
        return data or None
    except OSError:
        return data
    return data


def main() -> None:
    """Be the crowd."""
    stamped = "--stamped" in sys.argv
    how = " stamped" * stamped + " by chance" * ("--by-chance" in sys.argv)
    port, streams, every = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] + how
    models = sys.argv[4].split(",")
    requests = [request(model, every) for model in models]
    poll = select.epoll()
    clients: dict[int, socket.socket] = {}
    began: dict[int, float] = {}
    asks: dict[int, bytes] = {}
    for number in range(streams):
        client = socket.socket()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.perf_counter()
        if "--tls" in sys.argv:
            client = encrypt(client, port)
        else:
            client.connect_ex(("127.0.0.1", port))
        where = client.fileno()
        clients[where] = client
        asks[where] = requests[number % len(requests)]
        began[where] = started
        poll.register(where, select.EPOLLOUT)
    first: dict[int, float] = {}
    waiting = set(clients)
    deadline = time.perf_counter() + PATIENCE
    tokens, told = 0, False
    delays: list[float] = []
    while True:
        for where, events in poll.poll(0.5):
            if where == 0:
                if not os.read(0, 100):
                    return
                if stamped:
                    print("delays", *(f"{each:.6f}" for each in delays), flush=True)
                    delays.clear()
                else:
                    print("tokens", tokens, flush=True)
            elif events & select.EPOLLOUT:
                try:
                    clients[where].send(asks[where])
                    poll.modify(where, select.EPOLLIN)
                except OSError:
                    waiting.discard(where)
                    poll.unregister(where)
            else:
                data = receive(clients[where])
                if data is None:
                    continue
                tokens += data.count(MARK)
                if stamped:
                    now = time.monotonic_ns()
                    delays += [(now - int(stamp)) / 1e9 for stamp in STAMP.findall(data)]
                if where in waiting and MARK in data:
                    first[where] = time.perf_counter() - began[where]
                    waiting.discard(where)
                elif not data or (
                    where in waiting and data.startswith(b"HTTP/") and b" 200 " not in data[:20]
                ):
                    waiting.discard(where)
                    poll.unregister(where)
        if not told and (not waiting or time.perf_counter() > deadline):
            told = True
            print("opened", *(f"{each:.6f}" for each in first.values()))
            print("failed", streams - len(first), flush=True)
            poll.register(0, select.EPOLLIN)


if __name__ == "__main__":
    main()
