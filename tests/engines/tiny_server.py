"""A program for tests of the engine ``command``: a model server that loads nothing, and does what its prompts say.

``tiny_server.py PORT [FLAG]...``. What it does is appended to the file that the environment variable TINY_LOG names.
The flags: ``slow=SECONDS`` until it listens, ``fail=TEXT`` ends it with that on standard error, ``deaf`` ignores
SIGTERM, ``child`` starts another process in its group, ``never`` listens to nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def log(text):
    with open(os.environ["TINY_LOG"], "a") as file:
        file.write(f"{text} {os.getpid()}\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        log(f"ask {body['model']}")
        if not body.get("stream"):
            answer = {"object": "chat.completion", "choices": [], "model": body["model"]}
            data = json.dumps(answer | {"said": prompt}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.send(b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n')
        if prompt == "die":
            print("out of memory", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        while prompt == "go on":
            time.sleep(0.02)
            self.send(b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n')
        self.send(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def send(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        # The client has left.
        log("left")


def main():
    port, *flags = sys.argv[1:]
    options = dict(flag.partition("=")[::2] for flag in flags)
    log("start")
    print("loading the model", flush=True)
    if "deaf" in options:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in options:
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        with open(os.environ["TINY_LOG"], "a") as file:
            file.write(f"child {child.pid}\n")
    time.sleep(float(options.get("slow", 0)))
    if "fail" in options:
        print(options["fail"], file=sys.stderr)
        sys.exit(3)
    while "never" in options:
        time.sleep(1)
    Server(("127.0.0.1", int(port)), Handler).serve_forever()


main()
