"""A real nginx as a proxy in front of a server that says what it was asked: where nginx sees the end of each request.

nginx has its default settings, but for those that concern waiting and files. It reads the whole body of a request
before it asks the server behind it, so that server gets each request as nginx understands it, framed anew.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["NGINX", "Nginx", "open_nginx"]

#: The path of the program; ``None`` if it is not installed.
NGINX: Final = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

_CONFIGURATION: Final = """
daemon off;
master_process off;
pid nginx.pid;
error_log error.log info;
events {{}}
http {{
    access_log off;
    {paths}
    client_max_body_size 0;
    client_body_buffer_size 1m;
    # Read to the end what a client sends after its connection is to be closed: a reset could overtake the answer.
    lingering_close always;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{behind};
            proxy_http_version 1.1;
            # A client that has sent everything and closes its half of the connection has not left.
            proxy_ignore_client_abort on;
        }}
    }}
}}
"""
_PATIENCE: Final = 20.0
_ATTEMPTS: Final = 3
#: Follows everything else: answered, it shows that nginx waits for another request and not for the rest of one.
_SENTINEL: Final = b"GET /sentinel HTTP/1.1\r\nHost: x\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CLOSES: Final = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)
_MARK: Final = b"x-seen-by: the server behind\r\n"


class _Server(socketserver.ThreadingTCPServer):
    """Answers each request with its target and its body."""

    daemon_threads = True
    allow_reuse_address = True

    class Handler(socketserver.StreamRequestHandler):
        """Reads one request, which nginx has framed."""

        def handle(self) -> None:
            head = b""
            while not head.endswith(b"\r\n\r\n") and (line := self.rfile.readline()):
                head += line
            length = _LENGTH.search(head)
            body = self.rfile.read(int(length[1])) if length else b""
            target = head.split(b" ", 2)[1] if head.count(b" ") >= 2 else b""
            said = json.dumps([target.decode("latin-1"), body.decode("latin-1")]).encode()
            self.wfile.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (_MARK, len(said), said))


class Nginx:
    """A running nginx.

    Attributes:
        version: its name and version.
    """

    def __init__(self, port: int, version: str) -> None:
        self.version = version
        self._port = port

    def understand(self, data: bytes) -> tuple[list[bytes], str | int]:
        """Send bytes and return what nginx makes of them.

        Returns:
            The bodies of the requests that arrived behind it; and then the status with which it refused what followed,
            ``"open"`` if another request may follow, ``"close"`` if it closes the connection, or ``"more"`` if it waits
            for the rest of a request.
        """
        bodies: list[bytes] = []
        closes = False
        for head, body in _responses(self._send(data + _SENTINEL)):
            if _MARK not in head:
                return bodies, int(head.split(b" ", 2)[1])
            target, received = json.loads(body)
            if target == "/sentinel":
                return bodies, "open"
            bodies.append(received.encode("latin-1"))
            closes = _CLOSES.search(head) is not None
        return bodies, "close" if closes else "more"

    def _send(self, data: bytes) -> bytes:
        received = b""
        with socket.create_connection(("127.0.0.1", self._port), timeout=_PATIENCE) as connection:
            sender = threading.Thread(target=_send_all, args=(connection, data), daemon=True)
            sender.start()
            while piece := connection.recv(1 << 16):
                received += piece
            sender.join()
        return received


def _send_all(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
        # From here on, nothing has to be waited for by the clock.
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        # It has closed the connection.
        return


def _responses(received: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the head and the body of each response."""
    while received:
        if not received.startswith(b"HTTP/"):
            # HTTP/0.9: a body and nothing else.
            yield _MARK + b"\r\nconnection: close\r\n", received
            return
        head, _, received = received.partition(b"\r\n\r\n")
        head += b"\r\n"
        length = _LENGTH.search(head)
        size = int(length[1]) if length else len(received)
        yield head, received[:size]
        received = received[size:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def open_nginx(folder: Path) -> Iterator[Nginx]:
    """Run nginx, with all its files in ``folder``."""
    assert NGINX is not None
    with _Server(("127.0.0.1", 0), _Server.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            process, port = _start(folder, server.server_address[1])
            try:
                version = (
                    subprocess.run([NGINX, "-v"], capture_output=True, check=True).stderr.decode().strip()
                )
                yield Nginx(port, version.removeprefix("nginx version: "))
            finally:
                process.terminate()
                process.wait(_PATIENCE)
        finally:
            server.shutdown()


def _start(folder: Path, behind: int) -> tuple[subprocess.Popen[bytes], int]:
    assert NGINX is not None
    built = subprocess.run([NGINX, "-V"], capture_output=True, check=True).stderr.decode()
    # A directive of a module that it was built without is an error; so is a default folder that cannot be written.
    kinds = ["proxy", *(name for name in ("fastcgi", "uwsgi", "scgi") if f"--http-{name}-temp-path" in built)]
    paths = "client_body_temp_path body; " + " ".join(f"{kind}_temp_path {kind};" for kind in kinds)
    for attempt in range(_ATTEMPTS):
        port = _free_port()
        file = folder / f"nginx-{attempt}.conf"
        file.write_text(_CONFIGURATION.format(paths=paths, port=port, behind=behind))
        with (folder / f"started-{attempt}.log").open("wb") as log:
            command = [NGINX, "-p", str(folder), "-c", str(file), "-e", str(folder / "error.log")]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + _PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return process, port
        process.kill()
        process.wait()
    raise RuntimeError(f"nginx does not start: {(folder / f'started-{attempt}.log').read_text()}")
