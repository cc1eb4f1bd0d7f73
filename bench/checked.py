"""Clients of the model ``counting`` that check what they get; in one process, with one epoll and no tasks.

Opens all streams at once. Prints ``port N`` when each has got its first token, or has ended without one; for every line
that it reads, ``tokens N``, which is how many have come; and when all streams have ended one line of JSON:

- *errors*: how many ended in another way than with a whole answer, by what it was;
- *wrong*: how many whole answers have another text than they must have;
- *digests*: of each whole answer, as it came: without the framing of HTTP, comments, its id and its time.

    python bench/checked.py PORT STREAMS TOKENS SECONDS-BETWEEN-TOKENS
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import socket
import sys
from collections import Counter

from counting import token

#: Seconds without anything, from any stream, after which those that are left count as errors.
PATIENCE = 60.0
MARK = b'"content":"'
LAST_CHUNK = b"\r\n0\r\n\r\n"
CONTENT = re.compile(rb'"content":"([^"]*)"')
DIFFERS = re.compile(rb'"id":"[^"]*"|"created":[0-9]+')
COMMENT = re.compile(rb"(?m)^:[^\n]*\n\n")


def request(number: int, count: int, every: str) -> bytes:
    """Return what a client sends."""
    message = {"role": "user", "content": f"{number} {count} {every}"}
    body = json.dumps({"model": "counting", "stream": True, "messages": [message]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def body_of(answer: bytes) -> bytes:
    """Return the body of a whole answer, which came in chunks."""
    rest, pieces = answer.partition(b"\r\n\r\n")[2], []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        pieces.append(rest[:length])
        rest = rest[length + 2 :]
    return b"".join(pieces)


def fault_of(answer: bytes) -> str:
    """Return what is wrong with how an answer has ended; empty if it is whole."""
    if not answer.startswith(b"HTTP/1.1 200 "):
        return answer[:12].decode(errors="replace") or "no answer"
    if not answer.endswith(LAST_CHUNK):
        return "cut"
    if b'"error"' in answer:
        return "an error event"
    return "" if b"data: [DONE]" in answer else "no end"


def main() -> None:
    """Be the clients."""
    port, streams, count, every = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    poll = select.epoll()
    clients: dict[int, socket.socket] = {}
    numbers: dict[int, int] = {}
    answers: dict[int, list[bytes]] = {}
    for number in range(streams):
        client = socket.socket()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect_ex(("127.0.0.1", port))
        clients[client.fileno()], numbers[client.fileno()], answers[number] = client, number, []
        poll.register(client, select.EPOLLOUT)
    begun: set[int] = set()
    tokens, told = 0, False
    poll.register(0, select.EPOLLIN)
    while clients:
        if not (ready := poll.poll(PATIENCE)):
            break
        for where, events in ready:
            if where == 0:
                if not os.read(0, 100):
                    return
                print("tokens", tokens, flush=True)
                continue
            client, number = clients[where], numbers[where]
            if events == select.EPOLLOUT:
                client.send(request(number, count, every))
                poll.modify(where, select.EPOLLIN)
                continue
            try:
                data = client.recv(65536)
            except OSError:
                data = b""
            answers[number].append(data)
            if MARK in data:
                tokens += data.count(MARK)
                begun.add(number)
            if not data:
                poll.unregister(where)
                clients.pop(where).close()
                begun.add(number)
            if not told and len(begun) == streams:
                told = True
                print("port", port, flush=True)
    errors: Counter[str] = Counter()
    wrong, digests = 0, []
    for number, pieces in answers.items():
        answer = b"".join(pieces)
        if fault := fault_of(answer):
            errors["silent" if number in map(numbers.get, clients) else fault] += 1
            continue
        body = COMMENT.sub(b"", body_of(answer))
        text = b"".join(CONTENT.findall(body)).decode()
        wrong += text != "".join(token(number, place) for place in range(count))
        digests.append(hashlib.sha256(DIFFERS.sub(b"", body)).hexdigest())
    print(json.dumps({"errors": dict(errors), "wrong": wrong, "digests": digests}), flush=True)


if __name__ == "__main__":
    main()
