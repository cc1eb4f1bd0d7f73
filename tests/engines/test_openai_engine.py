"""The engine ``openai``: the models that it registers, and what it forwards between calls and the upstream server."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import patience
import pytest
import trio
from raw_server import RawServer, Received, Script, Visit, open_raw_server, reply
from test_model_field import form
from thread_shortage import no_threads
from trio.testing import wait_all_tasks_blocked

from trio_cluster import ApiError, ClusterServer, OptionsError
from trio_cluster.core import exhaustion
from trio_cluster.core.answer import Data, Done, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.engines import _upstream_models, parse_serve, serve_engine
from trio_cluster.engines._http_client import HttpClient
from trio_cluster.engines._upstream_models import Naming, parse_model_list

EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = EVENTS + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def listing(*entries: str | dict[str, Any]) -> bytes:
    data = [{"id": entry, "object": "model"} if isinstance(entry, str) else entry for entry in entries]
    return reply(json.dumps({"object": "list", "data": data}).encode())


class Upstream:
    """An upstream server: it answers polls of its models with ``list``, and everything else with the test's script.

    Attributes:
        list: the response to a poll; ``None``: it never answers.
        polls: the number of polls so far.
    """

    def __init__(self, answer: Script | None = None) -> None:
        self.list: bytes | None = listing("m")
        self.polls = 0
        self._answer = answer
        self._polled = trio.Event()

    async def script(self, visit: Visit) -> None:
        while True:
            received = await visit.head()
            if received.method == "GET":
                assert received.target == "/v1/models"
                self.polls += 1
                self._polled.set()
                if self.list is None:
                    await visit.closed(60)
                    return
                await visit.send(self.list)
                continue
            visit.unread(received)
            assert self._answer is not None
            await self._answer(visit)

    async def polled_again(self, times: int = 1) -> None:
        """Wait until it has been polled ``times`` times more, and the engine has processed the response."""
        wanted = self.polls + times
        with trio.fail_after(5):
            while self.polls < wanted:
                self._polled = trio.Event()
                await self._polled.wait()
            await wait_all_tasks_blocked(0.01)


def posts(server: RawServer) -> list[Received]:
    return [received for received in server.received if received.method == "POST"]


@asynccontextmanager
async def serving(server: ClusterServer, spec: str) -> AsyncIterator[None]:
    """Run the engine on a server whose handler pool runs."""
    async with trio.open_nursery() as nursery:
        await nursery.start(server._pool.serve)
        with trio.fail_after(5):
            await nursery.start(serve_engine, parse_serve(spec), server)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def engine_with(
    answer: Script, options: str = ""
) -> AsyncIterator[tuple[ClusterServer, RawServer, Upstream]]:
    """Run the engine with an upstream server that answers calls with a script."""
    upstream, server = Upstream(answer), ClusterServer()
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url}{options}"):
        yield server, raw, upstream


def request(
    body: bytes = b'{"model":"m"}', endpoint: str = "chat.completions", model: str = "m", **fields: Any
) -> Request:
    return Request(endpoint=endpoint, kind="chat", model=model, body=body, **fields)


@attrs.define
class Outcome:
    """The whole answer of a call."""

    head: Head | None = None
    pieces: list[bytes] = attrs.field(factory=list)
    error: ApiError | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


async def outcome_of(call: Call, into: Outcome | None = None) -> Outcome:
    outcome = into or Outcome()
    with trio.fail_after(5):
        while True:
            event = await call.receive()
            if isinstance(event, Head):
                outcome.head = event
            elif isinstance(event, Data):
                outcome.pieces.append(bytes(event.data))
            elif isinstance(event, Failed):
                outcome.error = event.error
                return outcome
            else:
                assert isinstance(event, Done)
                return outcome


async def ask(server: ClusterServer, call_request: Request) -> Outcome:
    return await outcome_of(server.router.open(call_request))


async def released(call: Call) -> None:
    """Wait until the work of a call has stopped."""
    stopped = trio.Event()
    call.on_release(stopped.set)
    with patience.fail_after(2):
        await stopped.wait()


# Options


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openai", "give the URL of the server's API: openai:http://127.0.0.1:8000/v1"),
        ("openai:", "give the URL of the server's API"),
        ("openai:127.0.0.1:8000", "expected a URL such as"),
        ("openai:http://u:p@host/v1", "leave the user and the fragment out"),
        ("openai:http://host/v1,key=", "some text"),
        ("openai:http://host/v1,key=two words", "no spaces"),
        ("openai:http://host/v1,key_env=NOT_THERE", "no environment variable 'NOT_THERE'"),
        ("openai:http://host/v1,key=a,key_env=PATH", "not both"),
        ("openai:http://host/v1,rename=a", "expected OLD:NEW, got 'a'"),
        ("openai:http://host/v1,rename=a:", "expected OLD:NEW, got 'a:'"),
        ("openai:http://host/v1,rename=a:b,a:c", "'a:c' contradicts"),
        ("openai:http://host/v1,rename=a:c,b:c", "'b:c' contradicts"),
        ("openai:http://host/v1,rename=a:b\tc", "printable"),
        ("openai:http://host/v1,only=", "expected patterns"),
        ("openai:http://host/v1,models=;", "expected names such as a;b"),
        ("openai:http://host/v1,prefix=", "expected some text"),
        ("openai:http://host/v1,max_concurrency=0", "from 1 to"),
        ("openai:http://host/v1,poll=0", "from 0.1 to"),
        ("openai:http://host/v1,usage=guess", "expected ask or observe, got 'guess'"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_starts(spec: str, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        parse_serve(spec)


def test_options_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "secret")
    spec = parse_serve(
        "openai:http://[::1]:1/a,b/v1,key_env=UPSTREAM_KEY,prefix=gpu/,only=llama*,qwen?,"
        "rename=llama3:8b:llama,qwen:q,max_concurrency=3,poll=0.5,cache_tokens=7000,models=llama3:8b; qwen"
    )
    assert spec.argument == "http://[::1]:1/a,b/v1"
    assert dict(spec.options) == {
        "key": None,
        "key_env": "UPSTREAM_KEY",
        "models": ("llama3:8b", "qwen"),
        "prefix": "gpu/",
        "only": ("llama*", "qwen?"),
        "rename": {"llama3:8b": "llama", "qwen": "q"},
        "max_concurrency": 3,
        "cache_tokens": 7000,
        "usage": "ask",
        "poll": 0.5,
    }


def test_names_are_selected_prefixed_and_renamed() -> None:
    naming = Naming("gpu/", ("llama*", "qwen?"), {"llama3:8b": "llama"})
    names = {name: naming.name(name) for name in ("llama3:8b", "llama2", "Llama", "qwen3", "qwen30")}
    assert names == {
        "llama3:8b": "llama", "llama2": "gpu/llama2", "Llama": None, "qwen3": "gpu/qwen3", "qwen30": None
    }  # fmt: skip
    assert Naming().name("a") == "a"


# The list of models


@pytest.mark.parametrize(
    ("entry", "context"),
    [
        ({"max_model_len": 4096}, 4096),
        ({"context_window": 1, "max_model_len": 2}, 1),
        ({"context_length": 8192}, 8192),
        ({"meta": {"n_ctx": 2048, "n_ctx_train": 131072}}, 2048),
        ({"max_model_len": "4096"}, None),
        ({"max_model_len": True}, None),
        ({"max_model_len": -1}, None),
        ({"meta": None}, None),
        ({}, None),
    ],
)
def test_the_context_size_is_found_in_every_known_field(entry: dict[str, Any], context: int | None) -> None:
    options = parse_model_list(json.dumps({"data": [{"id": "m", **entry}]}).encode())["m"]
    assert options.context_window == context


@pytest.mark.parametrize("limit", [5, "5", True, 0])
@pytest.mark.parametrize("modalities", [{"input": ["text"], "output": ["text"]}, ["text"], {"input": "text"}])
def test_what_a_server_says_of_lengths_and_modalities_is_shown_if_it_has_the_usual_form(
    limit: object, modalities: object
) -> None:
    entry = {"id": "m", "max_output_tokens": limit, "modalities": modalities}
    options = parse_model_list(json.dumps({"data": [entry]}).encode())["m"]
    assert options.max_output_tokens == (5 if limit == 5 and limit is not True else None)
    usual = isinstance(modalities, dict) and "output" in modalities
    assert options.extra_fields == ({"modalities": modalities} if usual else {})


def test_harmless_fields_of_an_entry_are_kept() -> None:
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    entry = {
        "id": "m", "object": "model", "created": 5, "owned_by": "vllm", "root": "/models/m", "permission": [{}],
        "max_model_len": 10, "tags": ["a", {"b": 1.5}], "deep": deep, "huge": 1 << 70, "null": None,
    }  # fmt: skip
    options = parse_model_list(json.dumps({"data": [entry]}).encode())["m"]
    assert options.extra_fields == {"max_model_len": 10, "tags": ["a", {"b": 1.5}], "null": None}
    assert not options.supports_vision
    long = parse_model_list(json.dumps({"data": [{"id": "m", "a": "x" * 5000, "b": 1}]}).encode())["m"]
    assert long.extra_fields == {}


@pytest.mark.parametrize("capabilities", [{"vision": True}, ["completion", "vision"]])
def test_a_model_with_the_capability_vision_is_shown_as_one(capabilities: Any) -> None:
    assert parse_model_list(json.dumps([{"id": "m", "capabilities": capabilities}]).encode())[
        "m"
    ].supports_vision


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b'"data"', b'{"data":null}', b'{"data":{"m":1}}', b"\xff", b"[" * 100_000]
)
def test_a_body_that_is_not_a_list_of_models_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="its list of models"):
        parse_model_list(body)


def test_malformed_entries_are_skipped() -> None:
    assert list(parse_model_list(b'{"data":[1,{},{"id":7},{"id":""},{"id":"m"},{"id":"m","x":1}]}')) == ["m"]


def test_an_overlong_list_is_truncated() -> None:
    entries = [{"id": f"m{number}"} for number in range(2000)]
    assert len(parse_model_list(json.dumps(entries).encode())) == 1000


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        (b'{"id":"b\\ud800"}', ["a", "c"]),
        (b'{"id":"b","x":"\\udc00","y":1}', ["a", "b", "c"]),
        (b'{"id":"b","x":{"\\ud800":1},"y":1}', ["a", "b", "c"]),
        (b'{"id":"b","x":1e400,"y":1}', ["a", "b", "c"]),
        (b'{"id":"b","x":[NaN,-Infinity],"y":1}', ["a", "b", "c"]),
        (b'{"id":"b","max_model_len":NaN,"y":1}', ["a", "b", "c"]),
        (b'{"id":"b","x":' + b"9" * 5000 + b',"y":1}', ["a", "b", "c"]),
        (b'{"id":"b\xff","y":1}', ["a", "c"]),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_bad_entry_costs_no_other_and_a_bad_value_not_its_entry(
    bad: bytes, names: list[str], mark: bytes
) -> None:
    models = parse_model_list(mark + b'{"data":[{"id":"a"},' + bad + b',{"id":"c"}]}')
    assert list(models) == names
    if "b" in models:
        assert {name: value for name, value in models["b"].extra_fields.items() if value is not None} == {
            "y": 1
        }


def test_the_models_that_are_wanted_are_taken_from_a_long_list() -> None:
    entries = [{"id": f"m{number}"} for number in range(2500)]
    models = parse_model_list(json.dumps(entries).encode())
    assert (len(models), models.left_out) == (1000, 1500)
    models = parse_model_list(json.dumps(entries).encode(), Naming(only=("m24*",)).takes)
    assert "m2499" in models
    assert models.left_out == 0


async def test_a_number_that_changes_does_not_register_the_model_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    upstream, server = Upstream(), ClusterServer()
    upstream.list = listing({"id": "m", "requests_running": 0, "seen": "12:00", "load": {"gpu": 0.5}})
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        registered = server.router.catalog.info("m")
        count = len(caplog.records)
        for number in range(3):
            upstream.list = listing(
                {"id": "m", "requests_running": number + 1, "seen": f"12:0{number + 1}", "load": {"gpu": 0.1}}
            )
            await upstream.polled_again()
        assert server.router.catalog.info("m") is registered
        assert len(caplog.records) == count


async def test_a_long_list_is_a_short_log_line_and_says_what_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.engines")
    upstream, server = Upstream(), ClusterServer()
    upstream.list = listing(*[f"model-{number}" for number in range(1200)])
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        assert len(server.list_models()) == 1000
        await upstream.polled_again(2)
        warning, info = caplog.records
        assert "1000 are served, 200 are left out" in warning.message
        assert info.fields["models"] == 1000  # type: ignore[attr-defined]
        assert "and 990 more" in info.fields["models_gained"]  # type: ignore[attr-defined]
        upstream.list = listing("other")
        await upstream.polled_again()
        assert all(len(str(record.__dict__)) < 2000 for record in caplog.records)


@pytest.mark.parametrize(
    "answer", [reply(b"", "404 Not Found"), reply(b"<html>"), reply(b"", "500 Oops"), listing("else")]
)
async def test_models_named_by_hand_are_served_while_the_server_answers_anything(answer: bytes) -> None:
    upstream, server = Upstream(), ClusterServer()
    upstream.list = answer
    spec = "models=a;b:8b,prefix=gpu/,poll=0.1"
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},{spec}"):
        assert server.list_models() == ["gpu/a", "gpu/b:8b"]
        await upstream.polled_again(2)
        assert server.list_models() == ["gpu/a", "gpu/b:8b"]
        raw.stop()
        with patience.fail_after(2):
            while server.list_models():  # noqa: ASYNC110
                await trio.sleep(0.02)


@pytest.mark.parametrize(
    "bad",
    [
        reply(b"", "500 Oops"),
        reply(b"", "404 Not Found"),
        reply(b"", "401 Unauthorized"),
        reply(b"<html>"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        b"SSH-2.0\r\n",
    ],
)
async def test_one_failed_poll_is_not_a_loss(bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    upstream, server = Upstream(), ClusterServer()
    withdrawn = []

    async def script(visit: Visit) -> None:
        await visit.request()
        upstream.polls += 1
        upstream._polled.set()
        # Every second poll fails.
        await visit.send(bad if upstream.polls % 2 == 0 else listing("m"))

    async with open_raw_server(script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        for _ in range(6):
            await upstream.polled_again()
            withdrawn.append(server.list_models() != ["m"])
    assert not any(withdrawn)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_a_failed_poll_is_repeated_soon() -> None:
    async def leave(visit: Visit) -> None:
        await visit.request()
        await visit.stream.aclose()

    async with engine_with(leave, ",poll=3600") as (server, _, upstream):
        upstream.list = reply(b"", "500 Oops")
        # A call whose connection is lost has the server polled.
        assert (await ask(server, request())).error is not None
        await upstream.polled_again(2 - upstream.polls + 1)
        assert server.list_models() == []


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_under_way_is_a_sign_of_life(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does one thing at a time does not answer polls meanwhile."""
    monkeypatch.setattr(_upstream_models, "POLL_TIMEOUT", 0.1)
    done = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        if begun:
            await visit.send(CHUNKED + chunk(b"data: 1\n\n"))
        await done.wait()
        await visit.send(chunk(b"data: 2\n\n") + b"0\r\n\r\n" if begun else reply(b"{}"))

    async with engine_with(script, ",poll=0.1") as (server, _, upstream):
        call = server.router.open(request())
        upstream.list = None
        await upstream.polled_again(6)
        assert server.list_models() == ["m"]
        done.set()
        outcome = await outcome_of(call)
        assert outcome.error is None
        # Without a call it is a loss again.
        await upstream.polled_again(4)
        assert server.list_models() == []


async def test_models_are_registered_when_the_engine_has_started_and_unregistered_with_it() -> None:
    upstream, server = Upstream(), ClusterServer()
    upstream.list = listing({"id": "a", "max_model_len": 7}, "b")
    async with open_raw_server(upstream.script) as raw:
        async with serving(server, f"openai:{raw.url},key=secret"):
            assert server.list_models() == ["a", "b"]
            info = server.router.catalog.info("a")
            assert isinstance(info, ModelInfo)
            assert (info.kind, info.options.context_window) == ("any", 7)
        assert server.list_models() == []
    assert raw.received[0].headers["authorization"] == "Bearer secret"


async def test_models_follow_the_server(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.engines")
    upstream, server = Upstream(), ClusterServer()
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        assert server.list_models() == ["m"]
        upstream.list = listing({"id": "m", "max_model_len": 5}, "n")
        await upstream.polled_again()
        assert server.list_models() == ["m", "n"]
        info = server.router.catalog.info("m")
        assert info is not None
        assert info.options.context_window == 5
        upstream.list = listing("n")
        await upstream.polled_again()
        assert server.list_models() == ["n"]
        count = len(caplog.records)
        await upstream.polled_again(2)
        # Without a change, nothing is logged.
        assert len(caplog.records) == count == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(b"", "500 Internal Server Error"), "with the status 500"),
        (reply(b"loading", "503 Service Unavailable"), "with the status 503"),
        (reply(b"", "302 Found"), "with the status 302"),
        (reply(b"<html>"), "not JSON"),
        (reply(b"{}"), "no 'data'"),
        (reply(b"", "401 Unauthorized"), "requires an API key: set key="),
        (reply(b"", "403 Forbidden"), "requires an API key: set key="),
        (reply(b"", "404 Not Found"), "URL ends in /v1"),
        (b"SSH-2.0\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", "in the middle"),
    ],
)
async def test_a_server_that_fails_has_no_models_until_it_recovers(
    answer: bytes, message: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_upstream_models, "MAX_BACKOFF", 0.1)
    upstream, server = Upstream(), ClusterServer()

    async def script(visit: Visit) -> None:
        await visit.request()
        upstream.polls += 1
        upstream._polled.set()
        assert upstream.list is not None
        await visit.send(upstream.list)

    async with open_raw_server(script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        assert server.list_models() == ["m"]
        upstream.list = answer
        await upstream.polled_again(2)
        assert server.list_models() == []
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert message in record.message
        assert raw.url in record.message
        upstream.list = listing("m")
        await upstream.polled_again()
        assert server.list_models() == ["m"]


async def test_a_refused_key_and_a_missing_one_are_different_messages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    upstream, server = Upstream(), ClusterServer()
    upstream.list = reply(b"", "401 Unauthorized")
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},key=secret"):
        assert "does not accept the API key: check key" in caplog.text
        assert "secret" not in caplog.text


async def test_a_server_that_cannot_be_reached_is_polled_until_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    upstream, server = Upstream(), ClusterServer()
    async with open_raw_server(upstream.script) as raw:
        pass
    async with serving(server, f"openai:{raw.url},poll=0.1"):
        assert server.list_models() == []
        assert "its models cannot be listed: Connection refused" in caplog.text
        async with trio.open_nursery() as nursery:
            await nursery.start(raw.serve)
            await upstream.polled_again()
            assert server.list_models() == ["m"]
            nursery.cancel_scope.cancel()


async def test_models_are_unregistered_after_the_second_timeout_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_upstream_models, "POLL_TIMEOUT", 0.1)
    upstream, server = Upstream(), ClusterServer()
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        for _ in range(2):
            upstream.list = None
            # When it is polled again, the first poll has timed out.
            await upstream.polled_again(2)
            assert server.list_models() == ["m"]
            upstream.list = listing("m")
            await upstream.polled_again()
        upstream.list = None
        await upstream.polled_again(3)
        assert server.list_models() == []
        upstream.list = listing("m")
        await upstream.polled_again()
        assert server.list_models() == ["m"]


async def test_a_server_whose_polls_time_out_keeps_its_models_while_it_answers_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_upstream_models, "POLL_TIMEOUT", 0.1)

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED)
        while True:
            await visit.send(chunk(b": busy\n\n"))
            await trio.sleep(0.03)

    async with engine_with(script, ",poll=0.1") as (server, _, upstream):
        call = server.router.open(request())
        upstream.list = None
        await upstream.polled_again(5)
        assert server.list_models() == ["m"]
        call.cancel("enough")


async def test_a_server_that_answers_polls_with_429_keeps_its_models() -> None:
    upstream, server = Upstream(), ClusterServer()
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        upstream.list = reply(b"", "429 Too Many Requests")
        await upstream.polled_again()
        assert server.list_models() == ["m"]


async def test_a_name_conflict_is_logged_once_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    upstream, server = Upstream(), ClusterServer()

    async def handler(request: Any) -> str:
        return "mine"

    server.register_chat("m", handler)
    upstream.list = listing("m", "n", "spaces ")
    async with open_raw_server(upstream.script) as raw, serving(server, f"openai:{raw.url},poll=0.1"):
        await upstream.polled_again(2)
        assert server.list_models() == ["m", "n"]
        assert len([record for record in caplog.records if "is left out" in record.message]) == 2
        server.unregister_model("m")
        await upstream.polled_again()
        info = server.router.catalog.info("m")
        assert info is not None
        assert info.kind == "any"


async def test_several_servers_run_side_by_side() -> None:
    first, second, server = Upstream(), Upstream(), ClusterServer()
    second.list = listing("m", "n")
    async with (
        open_raw_server(first.script) as one,
        open_raw_server(second.script) as other,
        serving(server, f"openai:{one.url}"),
        trio.open_nursery() as nursery,
    ):
        await nursery.start(serve_engine, parse_serve(f"openai:{other.url},prefix=b/"), server)
        assert server.list_models() == ["b/m", "b/n", "m"]
        nursery.cancel_scope.cancel()
    assert server.list_models() == []


async def test_a_call_that_cannot_reach_the_server_triggers_a_poll() -> None:
    async with engine_with(Visit.request, ",poll=3600") as (server, raw, _):  # type: ignore[arg-type]
        raw.stop()
        outcome = await ask(server, request())
        assert outcome.error is not None
        assert (outcome.error.status, outcome.error.code) == (502, "upstream_lost")
        assert str(raw.port) not in outcome.error.message
        await wait_all_tasks_blocked(0.05)
        assert server.list_models() == []


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL]
)
@pytest.mark.parametrize("grouped", [False, True])
async def test_a_machine_without_room_for_a_connection_is_over_capacity_and_the_models_stay(
    number: int, grouped: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.engines")
    monkeypatch.setattr(exhaustion, "_QUIET", 0.2)
    full = False
    open_stream = HttpClient._open_stream

    async def fail(client: HttpClient) -> trio.SocketStream:
        if not full:
            return await open_stream(client)
        error = OSError(number, "what the system says")
        if grouped:
            # As `trio.open_tcp_stream` raises it for a name with several addresses.
            raise OSError("all attempts failed") from ExceptionGroup("attempts", [OSError(111, "no"), error])
        raise error

    monkeypatch.setattr(HttpClient, "_open_stream", fail)

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(reply(b"{}", "200 OK", "application/json", "connection: close"))

    async with engine_with(script, ",poll=0.1") as (server, _, upstream):
        upstream.list = reply(b'{"data":[{"id":"m"}]}', "200 OK", "application/json", "connection: close")
        await upstream.polled_again()
        caplog.clear()
        full = True
        for _ in range(3):
            outcome = await ask(server, request())
            assert outcome.error is not None
            assert (outcome.error.status, outcome.error.code) == (503, "over_capacity")
            assert outcome.error.retry_after is not None
            await trio.sleep(0.15)
            assert server.list_models() == ["m"]
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert os.strerror(number) in caplog.text
        full = False
        assert (await ask(server, request())).error is None
        await trio.sleep(0.5)
        assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
        assert server.list_models() == ["m"]


async def test_a_name_that_cannot_be_resolved_for_want_of_a_thread_costs_no_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, upstream = ClusterServer(), Upstream()
    upstream.list = reply(b'{"data":[{"id":"m"}]}', "200 OK", "application/json", "connection: close")
    async with (
        open_raw_server(upstream.script) as raw,
        serving(server, f"openai:http://localhost:{raw.port}/v1,poll=0.1"),
    ):
        assert server.list_models() == ["m"]
        with no_threads():
            await trio.sleep(0.5)
            assert server.list_models() == ["m"]
            outcome = await ask(server, request())
        assert outcome.error is not None
        assert (outcome.error.status, outcome.error.code) == (503, "over_capacity")
        await trio.sleep(0.3)
        assert server.list_models() == ["m"]
    assert caplog.text.count("no room for connections to") == 1


# Requests


async def mirror(visit: Visit) -> None:
    """Respond with the body of the request."""
    received = await visit.request()
    await visit.send(reply(received.body))


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("chat.completions", "/v1/chat/completions"),
        ("audio.transcriptions", "/v1/audio/transcriptions"),
        ("images.generations", "/v1/images/generations"),
        ("/v1/tokenize", "/v1/tokenize"),
        ("/v1/messages/count_tokens", "/v1/messages/count_tokens"),
        ("messages", "/v1/messages"),
        ("messages.count_tokens", "/v1/messages/count_tokens"),
        ("/v1/a b?c#d%e\r\nf/\u00e9", "/v1/a%20b%3Fc%23d%25e%0D%0Af/%C3%A9"),
    ],
)
async def test_every_route_has_its_own_path_on_the_server(endpoint: str, target: str) -> None:
    body = b'\x00 {"model": "m" , "x":1.0}\n'
    async with engine_with(mirror) as (server, raw, _):
        outcome = await ask(server, request(body, endpoint, content_type="x/y; z"))
    assert outcome.body == body
    (received,) = posts(raw)
    assert (received.target, received.body, received.headers["content-type"]) == (target, body, "x/y; z")


@pytest.mark.parametrize("query", ["", "api-version=1&a=%0d%0aHost:%20x", "a=1?b"])
@pytest.mark.parametrize("endpoint", ["chat.completions", "/v1/tokenize"])
async def test_the_query_is_forwarded(endpoint: str, query: str) -> None:
    async with engine_with(mirror) as (server, raw, _):
        assert (await ask(server, request(endpoint=endpoint, query=query))).error is None
    (received,) = posts(raw)
    assert received.target.partition("?")[2] == query
    assert "host:" not in received.target


@pytest.mark.parametrize("query", ["a=\r\nx: 1", "a b", "a=\n", "a=\0", "a=\u00e9", "a#b"])
async def test_a_query_that_would_end_the_request_line_is_not_sent(query: str) -> None:
    async with engine_with(mirror) as (server, raw, _):
        outcome = await ask(server, request(query=query))
        assert outcome.error is not None
        assert outcome.error.status == 400
        assert posts(raw) == []


@pytest.mark.parametrize("endpoint", ["/v1/../admin", "/v1/./x", "/admin", "/v1", "/v1x/y", "unheard.of"])
async def test_no_request_leaves_the_base_url(endpoint: str) -> None:
    async with engine_with(mirror) as (server, raw, _):
        outcome = await ask(server, request(endpoint=endpoint))
        assert outcome.error is not None
        assert outcome.error.status == 404
        assert posts(raw) == []


async def test_only_headers_about_the_content_and_the_api_are_forwarded() -> None:
    passed = {
        "accept": "text/event-stream", "user-agent": "a/1", "x-stainless-lang": "python", "x-custom": "caf\u00e9",
        "traceparent": "00-1-2-01", "tracestate": "a=b", "baggage": "user=1", "idempotency-key": "k1",
        "openai-organization": "o", "anthropic-version": "2023-06-01", "x-ratelimit-tokens": "5",
    }  # fmt: skip
    kept = {
        "x-api-key": "theirs", "x-auth-token": "theirs", "x-http-method-override": "DELETE", "cookie": "c",
        "x-original-url": "/admin", "connection": "close", "x-broken": "a\r\nx: y",
    }  # fmt: skip
    async with engine_with(mirror, ",key=ours") as (server, raw, _):
        await ask(server, request(headers={**passed, **kept}, request_id="req_1"))
        await ask(server, request(endpoint="/v1/messages"))
    received, message = posts(raw)
    expected = {
        **passed, "authorization": "Bearer ours", "x-request-id": "req_1", "content-type": "application/json",
        "host": f"127.0.0.1:{raw.port}", "accept-encoding": "identity", "content-length": "13",
    }  # fmt: skip
    assert received.headers == expected
    assert message.headers["x-api-key"] == "ours"
    assert message.headers["user-agent"].startswith("trio-cluster/")


@pytest.mark.parametrize("status", ["404 Not Found", "405 Method Not Allowed", "501 Not Implemented"])
async def test_a_server_that_does_not_count_tokens_is_not_answered_for(status: str) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(reply(b'{"detail":"Not Found"}', status, "application/json"))

    async with engine_with(script) as (server, _, _):
        counted = await ask(server, request(endpoint="messages.count_tokens"))
        assert counted.error is not None
        assert (counted.error.status, counted.error.code, counted.error.final) == (501, "not_supported", True)
        other = await ask(server, request(endpoint="/v1/tokenize"))
        assert (other.body, other.error) == (b'{"detail":"Not Found"}', None)


@pytest.mark.parametrize("options", [",prefix=gpu/", ",rename=m:gpu/m"])
async def test_a_renamed_model_has_the_server_s_name_in_the_body_and_nothing_else_changes(
    options: str,
) -> None:
    async with engine_with(mirror, options) as (server, _, _):
        assert server.list_models() == ["gpu/m"]
        outcome = await ask(server, request(b'{"t":1.0e3,"model":"gpu/m","x":{"a" :1}}', model="gpu/m"))
        assert outcome.body == b'{"t":1.0e3,"model":"m","x":{"a" :1}}'
        sent = form(('name="file"; filename="f"', b"\x00\r\n"), ('name="model"', b"gpu/m"))
        call_request = request(
            sent, "audio.transcriptions", "gpu/m", content_type="multipart/form-data; boundary=abc"
        )
        outcome = await ask(server, call_request)
        assert outcome.body == sent.replace(b"gpu/m", b"m")
        outcome = await ask(server, request(b"no json", model="gpu/m"))
        assert outcome.error is not None
        assert outcome.error.status == 400


FORM = form(('name="file"; filename="f"', b"\x00\r\n" * 150_000), ('name="model"', b"gpu/m"))


@pytest.mark.parametrize("size", [len(FORM), -1])
@pytest.mark.parametrize("renamed", [False, True])
async def test_an_incomplete_body_is_forwarded_as_it_arrives(size: int, renamed: bool) -> None:
    arrived = trio.Event()

    async def script(visit: Visit) -> None:
        received = await visit.head()
        while len(visit.rest) < 50_000:
            await visit._more()
        arrived.set()
        visit.unread(received)
        await mirror(visit)

    upload = ByteChannel(size)
    name = "gpu/m" if renamed else "m"
    async with engine_with(script, ",prefix=gpu/" if renamed else "") as (server, raw, _):
        call_request = request(
            b"", "audio.transcriptions", name, content_type="multipart/form-data; boundary=abc", upload=upload
        )
        call = server.router.open(call_request)
        upload.put(FORM[:60_000])
        with patience.fail_after(2):
            await arrived.wait()
        upload.put(FORM[60_000:], last=True)
        outcome = await outcome_of(call)
    assert outcome.body == (FORM.replace(b"gpu/m", b"m") if renamed else FORM)
    (received,) = posts(raw)
    sized = size > 0 and not renamed
    assert received.headers.get("content-length") == (str(size) if sized else None)


SMUGGLED = b"POST /v1/other HTTP/1.1\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("cut", [1, 30, 1000])
async def test_the_preamble_and_the_epilogue_of_a_form_are_not_forwarded(
    renamed: bool, streamed: bool, sized: bool, cut: int
) -> None:
    name = "gpu/m" if renamed else "m"
    proper = form(('name="file"; filename="f"', b"\r\n--ab\r\n" * 40_000), ('name="model"', name.encode()))
    sent = SMUGGLED + b"\r\n" + proper + SMUGGLED
    upload = ByteChannel(len(sent) if sized else -1)
    async with engine_with(mirror, ",prefix=gpu/" if renamed else "") as (server, raw, _):
        call_request = request(
            b"" if streamed else sent, "audio.transcriptions", name,
            content_type="multipart/form-data; boundary=abc", upload=upload if streamed else None,
        )  # fmt: skip
        call = server.router.open(call_request)
        if streamed:
            # Cut through the preamble, and through the last delimiter.
            end = len(sent) - len(SMUGGLED) - cut
            for piece in (sent[:cut], sent[cut:end], sent[end : end + 2], sent[end + 2 :]):
                upload.put(piece)
            upload.put(b"", last=True)
        outcome = await outcome_of(call)
        assert outcome.body.rstrip(b"\r\n") == proper.replace(b"gpu/m", b"m").rstrip(b"\r\n")
        (received,) = posts(raw)
        if "content-length" in received.headers:
            assert len(received.body) == int(received.headers["content-length"])


async def test_a_form_without_a_delimiter_is_refused() -> None:
    async with engine_with(mirror) as (server, raw, _):
        for upload in (None, ByteChannel(300_000)):
            call_request = request(
                SMUGGLED if upload is None else b"", "audio.transcriptions",
                content_type="multipart/form-data; boundary=abc", upload=upload,
            )  # fmt: skip
            call = server.router.open(call_request)
            if upload is not None:
                upload.put(SMUGGLED * 6_000, last=True)
            outcome = await outcome_of(call)
            assert outcome.error is not None
            assert outcome.error.status == 400
        assert posts(raw) == []


async def test_incomplete_json_of_a_renamed_model_is_forwarded_when_it_is_complete() -> None:
    upload = ByteChannel(-1)
    async with engine_with(mirror, ",prefix=gpu/") as (server, _, _):
        call = server.router.open(request(b"", model="gpu/m", upload=upload))
        upload.put(b'{"model":"gpu/m","x":')
        upload.put(b"1}", last=True)
        assert (await outcome_of(call)).body == b'{"model":"m","x":1}'


async def test_an_early_refusal_of_an_upload_is_the_answer() -> None:
    async def script(visit: Visit) -> None:
        await visit.head()
        await visit.send(reply(b"too large", "413 Content Too Large"))
        await visit.closed()

    upload = ByteChannel(10_000_000)
    async with engine_with(script) as (server, _, _):
        call = server.router.open(request(b"", upload=upload))
        upload.put(b"x" * 1000)
        outcome = await outcome_of(call)
        assert outcome.head is not None
        assert (outcome.head.status, outcome.body) == (413, b"too large")
        assert upload.closed
        await released(call)


# Responses


@pytest.mark.parametrize("status", ["400 Bad Request", "429 Too Many Requests", "500 Oops", "503 Busy"])
async def test_every_response_of_the_server_is_the_answer(status: str) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        headers = (
            "Retry-After: 7",
            "Set-Cookie: a=b",
            "Server: s",
            "X-Request-Id: theirs",
            "X-Powered-By: p",
        )
        more = ("X-RateLimit-Remaining-Tokens: 3", "OpenAI-Processing-MS: 9", "Connection: keep-alive")
        await visit.send(reply(b'{"error": "so"}', status, "application/problem+json", *headers, *more))

    async with engine_with(script) as (server, _, upstream):
        outcome = await ask(server, request())
        assert outcome.head == Head(
            int(status[:3]),
            "application/problem+json",
            (
                ("retry-after", "7"),
                ("x-upstream-request-id", "theirs"),
                ("x-ratelimit-remaining-tokens", "3"),
                ("openai-processing-ms", "9"),
            ),
        )
        assert outcome.body == b'{"error": "so"}'
        assert (outcome.error, upstream.polls) == (None, 1)


async def test_a_stream_is_forwarded_unchanged_event_by_event() -> None:
    events = [
        b'data: {"delta":{"reasoning_content":"h\xc3\xa4"}}\r\n\r\n',
        b": ping\n\n",
        b"data: [DO",
        b"NE]\n\n",
    ]
    taken = [trio.Event() for _ in events]

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED)
        for event, known in zip(events, taken, strict=True):
            await visit.send(chunk(event))
            await known.wait()
        await visit.send(b"0\r\n\r\n")

    async with engine_with(script) as (server, _, _):
        call = server.router.open(request())
        with trio.fail_after(5):
            assert await call.receive() == Head(200, "text/event-stream")
            for event, known in zip(events, taken, strict=True):
                assert await call.receive() == Data(event)
                known.set()
            assert await call.receive() == Done()


async def test_a_content_encoding_is_kept() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(reply(b"\x1f\x8bzipped", "200 OK", "application/json", "Content-Encoding: gzip"))

    async with engine_with(script) as (server, _, _):
        outcome = await ask(server, request())
        assert outcome.head == Head(200, "application/json", (("content-encoding", "gzip"),))
        assert outcome.body == b"\x1f\x8bzipped"


async def test_forwarded_response_headers_are_bounded() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        many = [f"X-{number}: {'v' * 300}" for number in range(100)]
        await visit.send(reply(b"ok", "200 OK", "a/b", *many))

    async with engine_with(script) as (server, _, _):
        outcome = await ask(server, request())
        assert outcome.head is not None
        assert 40 < len(outcome.head.headers) <= 64
        assert outcome.body == b"ok"


CUT = [
    (b"", b"", None),
    (CHUNKED + chunk(b"data: 1\n\n"), b"data: 1\n\n", 200),
    (EVENTS + b"Content-Length: 100\r\n\r\ndata: 1\n\n", b"data: 1\n\n", 200),
    # Only the content shows that this is not complete.
    (EVENTS + b"\r\ndata: 1\n\n", b"data: 1\n\n", 200),
    (b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /v2\r\nContent-Length: 0\r\n\r\n", b"", None),
    (b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", b"", None),
    (b"nonsense", b"", None),
]


@pytest.mark.parametrize(("answer", "body", "status"), CUT)
async def test_an_incomplete_response_is_a_failure_and_never_an_end(
    answer: bytes, body: bytes, status: int | None
) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(answer)
        await visit.stream.aclose()

    async with engine_with(script) as (server, raw, _):
        outcome = await ask(server, request())
        assert outcome.error is not None
        assert (outcome.error.status, outcome.error.code) == (502, "upstream_lost")
        assert "'m'" in outcome.error.message
        assert str(raw.port) not in outcome.error.message
        assert outcome.body == body
        assert (outcome.head and outcome.head.status) == status


async def test_a_stream_with_framing_is_complete_without_done() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + chunk(b"data: 1\n\n") + b"0\r\n\r\n")

    async with engine_with(script) as (server, _, _):
        outcome = await ask(server, request())
        assert (outcome.body, outcome.error) == (b"data: 1\n\n", None)


@pytest.mark.parametrize(
    ("endpoint", "content"),
    [
        ("chat.completions", b"data: 1\n\ndata: [DONE]\n\n"),
        ("completions", b"data:[DONE]\r\n\r\n: bye\n\n"),
        ("/v1/messages", b"event: message_stop\n\n"),
        ("messages", b"event: message_stop\n\n"),
    ],
)
async def test_a_close_delimited_stream_is_complete_with_done(endpoint: str, content: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(EVENTS + b"\r\n" + content)
        await visit.stream.aclose()

    async with engine_with(script) as (server, _, _):
        outcome = await ask(server, request(endpoint=endpoint))
        assert (outcome.body, outcome.error) == (content, None)


# Cancellation, timeouts and backpressure


async def begin_nothing(visit: Visit) -> None:
    await visit.request()


async def begin_stream(visit: Visit) -> None:
    await visit.request()
    await visit.send(CHUNKED + chunk(b"data: 1\n\n"))


async def read_nothing(visit: Visit) -> None:
    await visit.head()


@pytest.mark.parametrize("begin", [begin_nothing, begin_stream, read_nothing])
@pytest.mark.parametrize("body", [b'{"model":"m"}', b"x" * 20_000_000])
async def test_a_cancelled_call_closes_the_connection_to_the_server_at_once(
    begin: Callable[[Visit], Awaitable[None]], body: bytes
) -> None:
    begun, closed = trio.Event(), trio.Event()

    async def script(visit: Visit) -> None:
        await begin(visit)
        begun.set()
        await visit.closed()
        closed.set()

    async with engine_with(script) as (server, _, _):
        call = server.router.open(request(body))
        with patience.fail_after(2):
            await begun.wait()
        call.cancel("client left")
        with patience.fail_after(0.5):
            await closed.wait()
        await released(call)


async def test_a_silent_server_is_cancelled_at_the_idle_timeout() -> None:
    closed = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.closed()
        closed.set()

    async with engine_with(script) as (server, _, _):
        outcome = await ask(server, request(idle_timeout=0.1))
        assert outcome.error is not None
        assert outcome.error.status == 504
        with patience.fail_after(0.5):
            await closed.wait()


async def test_a_client_that_does_not_read_slows_the_server_down() -> None:
    sent = 0

    async def script(visit: Visit) -> None:
        nonlocal sent
        await visit.request()
        await visit.send(CHUNKED)
        while True:
            await visit.send(chunk(b"x" * 65536))
            sent += 65536

    async with engine_with(script) as (server, _, _):
        call = server.router.open(request())
        # Nothing moves once the kernel's buffers are full.
        with trio.fail_after(5):
            await wait_all_tasks_blocked(0.2)
        assert 0 < sent < 50_000_000
        assert call.body.waiting_bytes <= call.body.window + 65536
        call.cancel("enough")


@pytest.mark.parametrize(("options", "together"), [("", 20), (",max_concurrency=2", 2)])
async def test_concurrent_calls_have_no_limit_unless_one_is_set(options: str, together: int) -> None:
    running = most = 0
    enough = trio.Event()

    async def script(visit: Visit) -> None:
        nonlocal running, most
        await visit.request()
        running += 1
        most = max(most, running)
        if running == together:
            enough.set()
        await enough.wait()
        await wait_all_tasks_blocked(0.01)
        running -= 1
        await visit.send(reply(b"ok"))

    async with engine_with(script, options) as (server, _, _), trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask, server, request())
    assert most == together
