"""The commands that ask a running node: what they request, what they print, and their one-line errors."""

from __future__ import annotations

import http.server
import json
import socket
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from command_line import Main, one_line

from trio_cluster.cli import admin_client, commands, tables

STATUS: dict[str, Any] = {
    "version": "1.2.3",
    "mode": "master",
    "node_id": "m1",
    "uptime": 90.0,
    "draining": False,
    "calls": {"admitted": 7, "worker_lost": 1},
    "slots": {"running": 0, "waiting": 0, "capacity": 10},
    "workers": [
        {
            "id": "gpu-1",
            "address": "10.0.0.5:53122",
            "state": "stalled",
            "stalled": "handler of 'chat' (models.py:12 in chat)",
            "models": ["chat", "embed"],
            "running": 2,
            "waiting": 0,
            "capacity": 4,
            "in_flight": 2,
            "connected_for": 11531.5,
        },
        {"id": "w\x1b[2J", "address": None, "state": "draining", "models": []},
    ],
    "models": [
        {"id": "chat", "kind": "chat", "owned_by": "me", "nodes": ["local", "gpu-1"]},
    ],
}


class ScriptedNode(http.server.BaseHTTPRequestHandler):
    """Sends the responses that the test has set, and records the requests.

    Attributes:
        requested: path and ``Authorization`` of each GET.
        posted: path, ``Authorization`` and JSON of each POST.
        later: the bodies of the following responses, in their order.
    """

    status = 200
    body = b""
    headers_to_send: dict[str, str] = {}  # noqa: RUF012
    requested: list[tuple[str, str | None]] = []  # noqa: RUF012
    posted: list[tuple[str, str | None, Any]] = []  # noqa: RUF012
    later: list[bytes] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requested.append((self.path, self.headers.get("Authorization")))
        self.respond()
        if self.later:
            type(self).body = self.later.pop(0)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        self.posted.append((self.path, self.headers.get("Authorization"), body))
        self.respond()
        if self.later:
            type(self).body = self.later.pop(0)

    def respond(self) -> None:
        self.send_response(self.status)
        for name, value in self.headers_to_send.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def node() -> Iterator[tuple[type[ScriptedNode], int]]:
    scripted = type(
        "ThisNode",
        (ScriptedNode,),
        {"requested": [], "posted": [], "later": [], "body": json.dumps(STATUS).encode()},
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), scripted) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield scripted, server.server_port
        server.shutdown()
        thread.join()


def test_status_prints_aligned_tables(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    code, out, err = main("status", f"http://127.0.0.1:{node[1]}")
    assert (code, err) == (0, "")
    assert out == textwrap.dedent("""\
        trio_cluster 1.2.3, master, node m1, up 1 min 30 s
        slots: 0 running, 0 waiting, 10 capacity
        calls: 7 admitted, 1 worker lost

        WORKER  ADDRESS         STATE     RUNNING  WAITING  CONNECTED   MODELS
        gpu-1   10.0.0.5:53122  stalled   2/4      0        3 h 12 min  chat, embed
        w?[2J   -               draining  -/-      -        -           -

        STALLED  WHY
        gpu-1    handler of 'chat' (models.py:12 in chat)

        MODEL  KIND  OWNER  SERVED BY
        chat   chat  me     local, gpu-1
        """)


def test_status_shows_which_models_cannot_be_started(
    main: Main, node: tuple[type[ScriptedNode], int]
) -> None:
    scripted, port = node
    cold = {"kind": "chat", "owned_by": "me", "state": "cold"}
    status = {
        "mode": "master",
        "workers": [{"id": "gpu-1", "models": ["a", "b"], "failed_models": ["a", "b"]}, {"id": "gpu-2"}],
        "models": [
            {"id": "a", "nodes": ["gpu-1", "local"], **cold},
            {"id": "b", "nodes": ["gpu-1", "gpu-2"], **cold},
        ],
        "calls": {},
        "on_demand": {"models": {"a": {"state": "failed", "why": "out of memory"}, "c": {"state": "cold"}}},
    }
    scripted.body = json.dumps(status).encode()
    code, out, _ = main("status", str(port))
    assert code == 0
    assert out.endswith(
        textwrap.dedent("""\
        CANNOT START  NODE   WHY
        a             gpu-1  see the log of the worker
        a             local  out of memory
        b             gpu-1  see the log of the worker

        MODEL  KIND  OWNER  SERVED BY     STATE
        a      chat  me     gpu-1, local  failed
        b      chat  me     gpu-1, gpu-2  cold
        """)
    )
    # Whatever is in the place of these.
    for wrong in ({"failed_models": 1}, {"failed_models": [None]}, {"failed_models": {"a": 1}}):
        for on_demand in (None, [], {"models": []}, {"models": {"a": 7}}):
            content = status | {"workers": [{"id": "w", **wrong}], "on_demand": on_demand}
            scripted.body = json.dumps(content).encode()
            assert main("status", str(port))[0] == 0


def test_status_can_print_the_json(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    code, out, _ = main("status", str(node[1]), "--json")
    assert code == 0
    assert json.loads(out) == STATUS


def test_status_sends_the_key_from_a_flag_or_a_variable(
    main: Main, node: tuple[type[ScriptedNode], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted, port = node
    main("status", f"127.0.0.1:{port}")
    main("status", f"http://127.0.0.1:{port}/v1/", "--api-key", "flag")
    monkeypatch.setenv("TRIO_CLUSTER_API_KEY", "variable")
    monkeypatch.setenv("TRIO_CLUSTER_PORT", str(port))
    main("status")
    assert scripted.requested == [
        ("/cluster/status", None),
        ("/cluster/status", "Bearer flag"),
        ("/cluster/status", "Bearer variable"),
    ]


def test_requests_to_this_machine_bypass_a_proxy(
    main: Main, node: tuple[type[ScriptedNode], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert main("status", f"127.0.0.1:{node[1]}")[0] == 0


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, b"", "access refused (HTTP 401): give its API key with --api-key or TRIO_CLUSTER_API_KEY"),
        (404, b"", "is not a trio_cluster node (HTTP 404); check the URL"),
        (503, b"", "failed to answer (HTTP 503); look into its log, or try again"),
        (200, b"<html>", "is not a trio_cluster node; check the URL"),
        (200, b'{"version": 1}', "is not a trio_cluster node; check the URL"),
        (200, b"[" * 100_000, "is not a trio_cluster node; check the URL"),
        (200, b"\xff", "is not a trio_cluster node; check the URL"),
    ],
)
def test_a_wrong_response_is_an_error_of_one_line(
    status: int, body: bytes, expected: str, main: Main, node: tuple[type[ScriptedNode], int]
) -> None:
    scripted, port = node
    scripted.status, scripted.body = status, body
    code, out, err = main("status", str(port))
    assert one_line(err) == f"http://127.0.0.1:{port}: {expected}"
    assert (code, out) == (1, "")


def test_a_wrong_key_is_told_from_a_missing_one(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    scripted, port = node
    scripted.status = 401
    assert one_line(main("status", str(port), "--api-key", "k")[2]).endswith(
        "(HTTP 401): the API key is wrong; give the right one with --api-key or TRIO_CLUSTER_API_KEY"
    )


def test_redirects_are_not_followed_so_that_the_key_is_not_sent_elsewhere(
    main: Main, node: tuple[type[ScriptedNode], int]
) -> None:
    scripted, port = node
    scripted.status, scripted.headers_to_send = 302, {"Location": f"http://127.0.0.1:{port}/elsewhere"}
    code, _, err = main("status", str(port), "--api-key", "k")
    assert "(HTTP 302)" in one_line(err)
    assert (code, len(scripted.requested)) == (1, 1)


def test_a_refused_connection_is_an_error_of_one_line(main: Main) -> None:
    with socket.socket() as held:
        held.bind(
            ("127.0.0.1", 0)
        )  # bound, not listening: no process can take it, and connections are refused
        port = held.getsockname()[1]
        code, _, err = main("status", str(port))
    assert (
        one_line(err)
        == f"http://127.0.0.1:{port}: cannot be reached: Connection refused; check the URL and that the node runs"
    )
    assert code == 1


def test_a_silent_server_is_an_error_of_one_line(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        code, _, err = main("status", str(port))
    assert (
        one_line(err) == f"http://127.0.0.1:{port}: no answer within 0.05 seconds; check that the node runs"
    )
    assert code == 1


def test_a_server_that_does_not_speak_http_is_an_error_of_one_line(main: Main) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        code, _, err = main("status", str(server.getsockname()[1]))
        thread.join()
    assert "does not speak HTTP, check the port: " in one_line(err)
    assert code == 1


@pytest.mark.parametrize(
    "status",
    [
        {"version": None, "mode": [], "workers": None, "models": {}},
        {"version": 1, "mode": 2, "workers": [1, None], "models": ["x"], "calls": 3, "uptime": float("nan")},
        {"version": 1, "mode": 2, "workers": [{"connected_for": 1e300, "models": {"a": 1}}], "models": [{}]},
    ],
)
def test_json_of_any_shape_can_be_shown(status: dict[str, Any]) -> None:
    assert "trio_cluster" in tables.describe_status(status)


def test_the_status_of_a_worker_shows_its_link_and_its_rejected_models() -> None:
    status = {
        "mode": "worker",
        "models": [],
        "calls": {},
        "connected": False,
        "rejected_models": {"a": "taken"},
    }
    assert tables.describe_status(status) == textwrap.dedent("""\
        trio_cluster, worker, without a master

        no models

        REJECTED  REASON
        a         taken""")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    status = {"version": "1", "mode": "master", "uptime": seconds}
    assert f", up {text}\n" in tables.describe_status(status)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("8080", "http://127.0.0.1:8080"),
        ("master:9000", "http://master:9000"),
        ("master", "http://master:8080"),
        ("master/v1", "http://master:8080"),
        ("::1", "http://[::1]:8080"),
        ("[::1]", "http://[::1]:8080"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("http://master", "http://master"),
        ("https://master/v1/", "https://master"),
        ("http://master/behind/a/proxy/", "http://master/behind/a/proxy"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_a_node_is_named_by_url_address_or_port(text: str, url: str) -> None:
    assert admin_client.node_url(text) == url


CALLS = {
    "calls": [
        {
            "request_id": "r1",
            "model": "echo",
            "kind": "chat",
            "endpoint": "chat.completions",
            "node": "gpu-1",
            "phase": "streaming",
            "age": 3723.4,
            "delivered": 1234,
            "client": "10.0.0.9:1234",
        },
        {"request_id": "two\nlines", "age": "old", "client": None, "delivered": 0},
    ]
}


def test_calls_are_an_aligned_table(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    scripted, port = node
    scripted.body = json.dumps(CALLS).encode()
    code, out, err = main("calls", str(port), "--api-key", "k")
    assert (code, err) == (0, "")
    assert out == textwrap.dedent("""\
        REQUEST    MODEL  ENDPOINT          NODE   PHASE      AGE        BYTES  CLIENT
        r1         echo   chat.completions  gpu-1  streaming  1 h 2 min  1234   10.0.0.9:1234
        two?lines  -      -                 -      -          -          0      -
        """)
    assert scripted.requested == [("/cluster/calls", "Bearer k")]
    assert json.loads(main("calls", str(port), "--json")[1]) == CALLS
    scripted.body = b'{"calls": []}'
    assert main("calls", str(port))[1] == "no calls\n"
    assert tables.describe_calls({"calls": [3, {}]})
    assert tables.describe_calls({"calls": {}}) == "no calls"


STORY = {
    "request_id": "r1",
    "outcome": "timed_out",
    "began": "2026-11-28T09:00:00Z",
    "seconds": 12.5,
    "slowest": "10.000 of 12.500 s in the queue of model 'm'",
    "earlier": 2,
    "steps": [
        {"at": 0, "text": "the request arrived"},
        {"at": 10.0125, "text": "waited 10.000 s\x1b[2J in the queue of model 'm'"},
        {"at": "soon"},
        3,
    ],
}


def test_a_story_is_a_line_for_each_step(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    scripted, port = node
    scripted.body = json.dumps(STORY).encode()
    code, out, err = main("why", "a/b c", str(port), "--api-key", "k")
    assert (code, err) == (0, "")
    assert out == textwrap.dedent("""\
        r1: timed out after 12.500 s; it began at 2026-11-28T09:00:00Z
        + 0.000 s  the request arrived
        +10.012 s  waited 10.000 s?[2J in the queue of model 'm'
        +     - s  -
        most of the time: 10.000 of 12.500 s in the queue of model 'm'
        earlier requests with this id: 2
        """)
    assert scripted.requested == [("/cluster/requests/a%2Fb%20c", "Bearer k")]
    assert json.loads(main("why", "r1", str(port), "--json")[1]) == STORY
    assert tables.describe_story({"outcome": "running", "steps": {}}).startswith("-: running for - s")


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (1, "1 call was cancelled"),
        (3, "3 calls were cancelled"),
        (0, "no call was cancelled: the request has ended already, and its handler is about to stop"),
    ],
)
def test_cancel_prints_the_number_of_calls(
    count: int, line: str, main: Main, node: tuple[type[ScriptedNode], int]
) -> None:
    scripted, port = node
    scripted.body = json.dumps({"request_id": "a/b c", "cancelled": count}).encode()
    code, out, err = main("cancel", "a/b c", f"127.0.0.1:{port}/v1", "--api-key", "k", "--reason", "enough")
    assert (code, out, err) == (0, f"{line}\n", "")
    assert scripted.posted == [("/cluster/calls/a%2Fb%20c/cancel", "Bearer k", {"reason": "enough"})]


def test_load_and_unload_say_where_that_was_done(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    scripted, port = node
    scripted.body = b'{"model": "a/b", "state": "ready", "nodes": ["gpu-1"]}'
    assert main("load", "a/b", str(port), "--api-key", "k") == (0, "a/b is ready on gpu-1\n", "")
    scripted.body = b'{"model": "a/b", "state": "cold", "nodes": ["gpu-1", "gpu-2"]}'
    code, out, _ = main("unload", "a/b", str(port), "--api-key", "k", "--worker", "gpu-1")
    assert (code, out) == (0, "a/b was unloaded from gpu-1, gpu-2\n")
    scripted.body = b'{"model": "a/b", "state": "cold", "nodes": []}'
    assert main("unload", "a/b", str(port))[1] == "a/b is not loaded\n"
    assert scripted.posted[:2] == [
        ("/cluster/models/a%2Fb/load", "Bearer k", {}),
        ("/cluster/models/a%2Fb/unload", "Bearer k", {"worker": "gpu-1"}),
    ]


def test_status_shows_the_states_of_models_if_some_are_not_ready(
    main: Main, node: tuple[type[ScriptedNode], int]
) -> None:
    models = [
        {"id": name, "kind": "any", "owned_by": "x", "nodes": ["w"], "state": state}
        for name, state in (("a", "cold"), ("b", "ready"))
    ]
    node[0].body = json.dumps(STATUS | {"models": models}).encode()
    _, out, _ = main("status", str(node[1]))
    assert "MODEL  KIND  OWNER  SERVED BY  STATE" in out
    assert "a      any   x      w          cold" in out


@pytest.mark.parametrize(
    "argv", [["cancel", "r1"], ["drain", "w1"], ["why", "r1"], ["load", "m"], ["unload", "m"]], ids=" ".join
)
def test_the_error_message_of_a_node_is_printed_in_one_line(
    argv: list[str], main: Main, node: tuple[type[ScriptedNode], int]
) -> None:
    scripted, port = node
    scripted.status = 404
    scripted.body = json.dumps({"error": {"message": "none\nsuch\x1b", "code": "x_not_found"}}).encode()
    code, out, err = main(*argv, str(port))
    assert one_line(err) == f"http://127.0.0.1:{port}: none?such?"
    assert (code, out) == (1, "")
    scripted.body = b'{"error": {"message": "Unknown URL", "code": null}}'
    assert "is not a trio_cluster node (HTTP 404)" in one_line(main(*argv, str(port))[2])


def worker(in_flight: int, draining: bool = True, instance: str = "one") -> dict[str, Any]:
    return {"id": "gpu 1", "instance": instance, "draining": draining, "in_flight": in_flight}


def with_workers(*workers: dict[str, Any]) -> bytes:
    return json.dumps(STATUS | {"workers": [{"id": "other"}, *workers]}).encode()


def test_drain_waits_until_the_process_that_was_asked_has_left(
    main: Main, node: tuple[type[ScriptedNode], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_DRAIN_POLL", 0.0)
    scripted, port = node
    scripted.body = json.dumps(worker(2)).encode()
    scripted.later += [
        with_workers(worker(2)),
        with_workers(worker(1)),
        with_workers(worker(1)),
        # Another process has connected under the same name.
        with_workers(worker(5, draining=False, instance="two")),
    ]
    code, out, err = main("drain", "gpu 1", str(port), "--api-key", "k")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "gpu 1 drains: 2 requests in flight",
        "gpu 1 drains: 1 request in flight",
        "gpu 1 has left",
    ]
    assert scripted.posted == [("/cluster/workers/gpu%201/drain", "Bearer k", {})]


def test_drain_is_requested_again_if_the_worker_reconnects_without_draining(
    main: Main, node: tuple[type[ScriptedNode], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_DRAIN_POLL", 0.0)
    scripted, port = node
    scripted.body = json.dumps(worker(0)).encode()
    scripted.later += [
        with_workers(worker(0, draining=False)),
        json.dumps(worker(0)).encode(),
        with_workers(worker(0)),
        with_workers(),
    ]
    assert main("drain", "gpu 1", str(port))[0] == 0
    assert len(scripted.posted) == 2


def test_drain_without_waiting(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    scripted, port = node
    scripted.body = json.dumps(worker(0)).encode()
    code, out, _ = main("drain", "gpu 1", str(port), "--no-wait")
    assert (code, out) == (0, "gpu 1 drains: 0 requests in flight\n")
    assert scripted.requested == []


def test_an_interrupted_drain_ends_with_code_1(
    main: Main, node: tuple[type[ScriptedNode], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", interrupt)
    scripted, port = node
    scripted.body = json.dumps(worker(1)).encode()
    code, _, err = main("drain", "gpu 1", str(port))
    assert code == 1
    assert one_line(err) == "stopped waiting; the worker 'gpu 1' drains on"


def test_status_shows_who_waits(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    slots = {"running": 1, "waiting": 3, "capacity": 1, "waiting_by": {"alice": 2, "": 1}}
    node[0].body = json.dumps(STATUS | {"slots": slots}).encode()
    _, out, _ = main("status", str(node[1]))
    assert "slots: 1 running, 3 waiting, 1 capacity\nwaiting by key: alice 2, without a key 1\n" in out


def test_an_invitation_is_the_only_line_on_standard_output(
    main: Main, node: tuple[type[ScriptedNode], int]
) -> None:
    invitation = {
        "token": "tcj-abc",
        "command": "trio-cluster worker --join tcj-abc",
        "addresses": ["gpu.lan:8080"],
        "expires_at": "2030-01-01T00:00:00+00:00",
    }
    node[0].body = json.dumps(invitation).encode()
    code, out, err = main(
        "invite", str(node[1]), "--name", "w", "--expires", "2d", "--address", "a:1", "--address", "b:2"
    )
    assert (code, out) == (0, "trio-cluster worker --join tcj-abc\n")
    assert err == "valid once, until 2030-01-01T00:00:00+00:00; the worker connects to gpu.lan:8080\n"
    assert node[0].posted[-1][::2] == (
        "/cluster/invites",
        {"name": "w", "expires": "2d", "addresses": ["a:1", "b:2"]},
    )


def test_revoking_a_worker_says_what_has_happened(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    node[0].body = json.dumps({"name": "a/b", "revoked": True, "was_connected": True}).encode()
    assert main("revoke", "a/b", str(node[1]))[:2] == (
        0,
        "a/b is refused from now on\nits link was ended\n",
    )
    assert node[0].posted[-1][0] == "/cluster/workers/a%2Fb/revoke"


def test_an_authority_is_replaced(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    node[0].body = json.dumps({"fingerprint": "ab12"}).encode()
    code, out, _ = main("ca", "rotate", str(node[1]))
    assert (code, "the new authority is ab12" in out) == (0, True)
    assert node[0].posted[-1][0] == "/cluster/ca/rotate"


def test_status_has_the_masters_of_workers() -> None:
    others = [{"id": "b", "address": "b:9080", "workers": ["w1", "w2"]}]
    assert tables.describe_status({"mode": "master", "masters": others}).splitlines()[4:6] == [
        "OTHER MASTER  ADDRESS  WORKERS",
        "b             b:9080   w1, w2",
    ]
    own = [
        {"id": "a", "address": "a:9080", "connected": True, "in_flight": 2, "why": ""},
        {"id": "", "address": "b:9080", "connected": False, "in_flight": 0, "why": "Connection refused"},
    ]
    assert tables.describe_status({"mode": "worker", "masters": own}).splitlines()[2:5] == [
        "MASTER  ADDRESS  CONNECTED  IN FLIGHT  WHY NOT",
        "a       a:9080   yes        2          -",
        "-       b:9080   no         0          Connection refused",
    ]


def test_the_processes_of_a_master_are_shown() -> None:
    processes = [
        {"process": 0, "state": "ok", "pid": 7, "in_flight": 3, "uptime": 61.0, "restarts": 0},
        {"process": 1, "state": "down", "pid": 0, "in_flight": 0, "uptime": 0.0, "restarts": 2},
    ]
    shown = tables.describe_status({"mode": "master", "processes": processes}).splitlines()
    table = shown[shown.index(next(line for line in shown if line.startswith("PROCESS"))) :]
    assert [line.split() for line in table[1:3]] == [
        ["0", "ok", "7", "3", *table[1].split()[4:-1], "0"],
        ["1", "down", "0", "0", *table[2].split()[4:-1], "2"],
    ]
