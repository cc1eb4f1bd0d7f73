"""Aliases: other names for models, in every shape of request, and what clients, keys and logs see of them."""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError, ClusterServer, RawCall
from trio_cluster.core.limits import PARSE_IN_THREAD
from trio_cluster.core.model import ChatModelOptions
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.gateway.body import SPOOL_THRESHOLD
from trio_cluster.openai import read_object
from trio_cluster.options import ClusterServerOptions
from trio_cluster.testing import Response, SimulatedCluster, open_cluster, settle, worker

ALIASES: dict[str, Any] = {
    "talk": "chat",
    "far-talk": "far-chat",
    "assistant": ["nowhere", "vectors", "chat", "far-chat"],
    "canary": {"chat": 0.5, "far-chat": 0.5},
    "sometimes": ["canary", "chat"],
    "embed": ["far-vectors", "vectors"],
    "listen": "hearing",
    "far-listen": ["nowhere", "far-hearing"],
    "bytes": "raw",
    "far-bytes": "far-raw",
    "mixed": ["raw", "chat"],
    "draw": "pictures",
    "nothing": ["nowhere", "nobody"],
    "chat-or-more": ["chat-or-more", "chat"],
    "ä b": "chat",
}


class Seen:
    """What handlers were called with: the node, the model and the name in the body."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str]] = []

    def handler(self, give: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
        async def handle(request: Any) -> Any:
            self.requests.append((request.worker, request.model, request.raw["model"]))
            return give(request)

        return handle

    async def raw(self, call: RawCall) -> None:
        body = bytearray()
        while piece := await call.receive():
            body += piece
        if call.request.content_type == "application/json":
            name = read_object(bytes(body))["model"]
        else:
            name = body.split(b'name="model"')[1].split(b"\r\n")[2].decode()
        self.requests.append((call.worker, call.request.model, name))
        call.begin(200, "application/json")
        await call.send(b'{"object":"raw"}')


def register(server: ClusterServer, seen: Seen, prefix: str = "") -> None:
    async def count(request: Any) -> int:
        return 7

    server.register_chat(prefix + "chat", seen.handler(lambda request: "hello"), count_tokens=count)
    server.register_embedding(prefix + "vectors", seen.handler(lambda request: [[1.0]]))
    server.register_asr(prefix + "hearing", seen.handler(lambda request: str(len(request.audio))))
    server.register_raw(prefix + "raw", seen.raw)


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[tuple[SimulatedCluster, Seen]]:
    seen = Seen()
    async with open_cluster(aliases=ALIASES, **options) as cluster:
        register(cluster.master.server, seen)
        far = worker("far", **{k: v for k, v in options.items() if k != "authenticator"})
        register(far, seen, "far-")
        far.register_image_generation("pictures", seen.handler(lambda request: b"png"))
        await cluster.start_worker(far)
        yield cluster, seen
        await settle(cluster)


def form(model: str, size: int = 10, *, last: bool = False) -> tuple[bytes, dict[str, str]]:
    name = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % model.encode()
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    parts = [name, head + b"x" * size + b"\r\n"]
    if last:
        parts.reverse()
    return b"".join(parts) + b"--B--\r\n", {"content-type": "multipart/form-data; boundary=B"}


CHAT = [{"role": "user", "content": "hi"}]
#: Path, fields besides the model, and where the answer has its model.
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": CHAT}),
    "chat stream": ("/v1/chat/completions", {"messages": CHAT, "stream": True}),
    "completions": ("/v1/completions", {"prompt": "hi"}),
    "responses": ("/v1/responses", {"input": "hi"}),
    "responses stream": ("/v1/responses", {"input": "hi", "stream": True}),
    "messages": ("/v1/messages", {"messages": CHAT, "max_tokens": 5}),
    "messages stream": ("/v1/messages", {"messages": CHAT, "max_tokens": 5, "stream": True}),
}


def model_in(response: Response) -> str:
    """Return the model that an answer names, which must be the same wherever it does."""
    assert response.status == 200, response.body
    text = response.body.decode()
    names = set()
    for line in text.splitlines():
        line = line.removeprefix("data: ")
        if line.startswith("{"):
            event = json.loads(line)
            for where in (event, event.get("message", {}), event.get("response", {})):
                if "model" in where:
                    names.add(where["model"])
    (name,) = names
    return str(name)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("alias", "model", "node"), [("talk", "chat", "master"), ("far-talk", "far-chat", "far")]
)
async def test_every_route_of_a_chat_takes_an_alias(
    route: str, alias: str, model: str, node: str, autojump_clock: MockClock
) -> None:
    path, fields = ROUTES[route]
    async with opened() as (cluster, seen):
        response = await cluster.client().post(path, {"model": alias, **fields})
        # The client gets the name that it knows; the handler, here and on a worker, that of the model.
        assert model_in(response) == alias
        assert seen.requests == [(node, model, model)]
        assert response.headers["x-trio-cluster-model"] == model
        assert response.headers["x-trio-cluster-worker"] == ("local" if node == "master" else "far")


async def test_other_routes_take_an_alias(autojump_clock: MockClock) -> None:
    async with opened() as (cluster, seen):
        client = cluster.client()
        for alias in ("talk", "far-talk"):
            counted = await client.post("/v1/messages/count_tokens", {"model": alias, "messages": CHAT})
            assert counted.json() == {"input_tokens": 7}
        embedded = await client.post("/v1/embeddings", {"model": "embed", "input": "hi"})
        assert embedded.json()["model"] == "embed"
        assert seen.requests.pop() == ("far", "far-vectors", "far-vectors")
        drawn = await client.post("/v1/images/generations", {"model": "draw", "prompt": "hi"})
        assert drawn.status == 200
        assert seen.requests.pop() == ("far", "pictures", "pictures")
        for alias, node, model in (("bytes", "master", "raw"), ("far-bytes", "far", "far-raw")):
            for path in ("/v1/chat/completions", "/v1/anything"):
                answer = await client.post(path, {"model": alias, "messages": CHAT})
                assert answer.json() == {"object": "raw"}
                assert seen.requests.pop() == (node, model, model)
                assert answer.headers["x-trio-cluster-model"] == model


@pytest.mark.parametrize("size", [10, 2 * SPOOL_THRESHOLD])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("alias", "node", "model"),
    [("listen", "master", "hearing"), ("far-listen", "far", "far-hearing"), ("far-bytes", "far", "far-raw")],
)
async def test_forms_take_an_alias_also_while_they_arrive(
    size: int, last: bool, alias: str, node: str, model: str, autojump_clock: MockClock
) -> None:
    body, headers = form(alias, size, last=last)
    async with opened() as (cluster, seen):
        answer = await cluster.client().post("/v1/audio/transcriptions", body, headers=headers)
        assert answer.status == 200, answer.body
        assert seen.requests == [(node, model, model)]
        if "hearing" in model:
            assert answer.json()["text"] == str(size)


async def test_a_large_body_takes_an_alias(autojump_clock: MockClock) -> None:
    async with opened() as (cluster, seen):
        text = "x" * (PARSE_IN_THREAD + 1)
        answer = await cluster.client().chat("assistant", text, stream=False)
        assert answer.json()["model"] == "assistant"
        assert seen.requests == [("master", "chat", "chat")]


async def test_a_body_that_names_two_models_is_refused_also_if_one_is_an_alias(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (cluster, _):
        body = b'{"model":"chat","messages":[{"role":"user","content":"hi"}],"model":"talk"}'
        answer = await cluster.client().post("/v1/chat/completions", body)
        assert answer.status == 400
        assert "more than once" in answer.error["message"]


async def test_a_list_goes_past_models_that_are_unknown_and_those_that_do_not_answer_the_route(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (cluster, _):
        client = cluster.client()
        answer = await client.chat("assistant", stream=False)
        assert answer.headers["x-trio-cluster-model"] == "chat"
        embedded = await client.post("/v1/embeddings", {"model": "assistant", "input": "hi"})
        assert embedded.headers["x-trio-cluster-model"] == "vectors"
        cluster.master.server.unregister_model("chat")
        answer = await client.chat("assistant", stream=False)
        assert answer.headers["x-trio-cluster-model"] == "far-chat"
        cluster.master.server.unregister_model("vectors")
        refused = await client.post("/v1/embeddings", {"model": "assistant", "input": "hi"})
        # It was served a moment ago.
        assert (refused.status, refused.error["code"]) == (503, "model_unavailable")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [429, 502, 503, 504, 529, 400, 401, 500, 501])
async def test_a_list_goes_on_if_the_server_behind_a_model_cannot_take_the_request(
    status: int, stream: bool, autojump_clock: MockClock
) -> None:
    """Whatever else the server answers is an answer."""
    stopped = 0

    async def upstream(call: RawCall) -> None:
        nonlocal stopped
        call.begin(status, "application/json", [("retry-after", "7")])
        try:
            await call.send(b'{"error":{"message":"its own words"}}')
            await trio.sleep(1)
        finally:
            stopped += 1

    aliases = {
        "list": ["theirs", "nowhere", "ours"],
        "only": ["theirs", "nowhere"],
        "twice": ["theirs", "too"],
    }
    async with open_cluster(aliases=aliases) as cluster:
        server, client = cluster.master.server, cluster.client()
        server.register_raw("theirs", upstream)
        server.register_raw("too", upstream)
        server.register_chat("ours", Seen().handler(lambda request: "hello"))
        answer = await client.chat("list", stream=stream)
        goes_on = status in (429, 502, 503, 504, 529)
        assert answer.status == (200 if goes_on else status)
        assert answer.headers["x-trio-cluster-model"] == ("ours" if goes_on else "theirs")
        assert answer.headers.get("retry-after") == (None if goes_on else "7")
        await settle(cluster)
        assert stopped == 1
        assert server.router.stats.retried == goes_on
        # Without another name that can be asked, the answer is the server's, with all that it says.
        for name, last in (("only", "theirs"), ("twice", "too" if goes_on else "theirs")):
            answer = await client.chat(name, stream=stream)
            assert (answer.status, answer.headers["retry-after"]) == (status, "7")
            assert (answer.headers["x-trio-cluster-model"], answer.error["message"]) == (
                last,
                "its own words",
            )
        await settle(cluster)
        assert not server.router.live


async def test_a_list_goes_on_although_a_comment_was_sent_before_the_server_refused(
    autojump_clock: MockClock,
) -> None:
    async def upstream(call: RawCall) -> None:
        await trio.sleep(25)
        call.begin(503, "application/json")
        await call.send(b"{}")

    async with open_cluster(aliases={"list": ["theirs", "ours"]}, operator_key="k") as cluster:
        cluster.master.server.register_raw("theirs", upstream)
        cluster.master.server.register_chat("ours", Seen().handler(lambda request: "hello"))
        answer = await cluster.client().chat("list", stream=True)
        assert answer.status == 200
        assert answer.body.startswith(b":")
        assert b"hello" in answer.body
        assert answer.body.endswith(b"data: [DONE]\n\n")
        operator = cluster.client(authorization="Bearer k")
        story = (await operator.get(f"/cluster/requests/{answer.headers['x-request-id']}")).json()
        refused, following = (
            [step["at"] for step in story["steps"] if step["text"].startswith(text)]
            for text in (
                "the server behind 'theirs' answered 503: it cannot take the request now",
                "went on to the next name, 'ours'",
            )
        )
        assert refused == following == [pytest.approx(25, abs=0.1)]
        assert story["outcome"] == "completed"


async def test_the_story_of_a_refusal_after_a_comment_does_not_say_that_there_was_an_answer(
    autojump_clock: MockClock,
) -> None:
    async def upstream(call: RawCall) -> None:
        await trio.sleep(25)
        call.begin(503, "application/json")
        await call.send(b'{"error":{"message":"its own words"}}')

    async with open_cluster(operator_key="k") as cluster:
        cluster.master.server.register_raw("theirs", upstream)
        answer = await cluster.client().chat("theirs", stream=True)
        assert (answer.status, answer.body[:1]) == (200, b":")
        operator = cluster.client(authorization="Bearer k")
        story = (await operator.get(f"/cluster/requests/{answer.headers['x-request-id']}")).json()
        assert (story["outcome"], story["by"]) == ("failed", "model")
        assert story["steps"][-1]["text"].endswith("the answer could not be used: 503: its own words")


async def test_models_without_eyes_are_skipped_for_a_request_with_an_image(autojump_clock: MockClock) -> None:
    seen = Seen()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [image]}]
    async with open_cluster(aliases={"a": ["blind", "seeing"], "b": "blind"}) as cluster:
        server = cluster.master.server
        server.register_chat("blind", seen.handler(lambda request: "no"))
        server.register_chat(
            "seeing", seen.handler(lambda request: "yes"), ChatModelOptions(supports_vision=True)
        )
        client = cluster.client()
        answer = await client.post("/v1/chat/completions", {"model": "a", "messages": messages})
        assert answer.headers["x-trio-cluster-model"] == "seeing"
        refused = await client.post("/v1/chat/completions", {"model": "b", "messages": messages})
        assert (refused.status, refused.error["code"]) == (400, "vision_not_supported")


async def test_an_alias_of_nothing_says_so_and_one_of_the_wrong_kind_too(autojump_clock: MockClock) -> None:
    async with opened() as (cluster, _):
        client = cluster.client()
        refused = await client.chat("nothing", stream=False)
        assert (refused.status, refused.error["code"]) == (404, "model_not_found")
        assert refused.error["message"].startswith("No model that 'nothing' is an alias of is served. Avail")
        assert "assistant" in refused.error["message"]
        refused = await client.post("/v1/embeddings", {"model": "talk", "input": "hi"})
        assert (refused.status, refused.error["code"]) == (400, "model_kind_mismatch")
        unknown = await client.chat("no-such", stream=False)
        assert unknown.error["message"].startswith("The model 'no-such' does not exist")


async def test_an_invalid_request_is_refused_and_not_offered_to_the_next_model(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (cluster, seen):
        refused = await cluster.client().post("/v1/chat/completions", {"model": "assistant", "messages": []})
        assert refused.status == 400
        assert seen.requests == []


async def test_a_list_of_a_passthrough_model_and_another_one_gives_each_what_it_takes(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (cluster, seen):
        client = cluster.client()
        assert (await client.chat("mixed", stream=False)).json() == {"object": "raw"}
        cluster.master.server.unregister_model("raw")
        answer = await client.chat("mixed", stream=False)
        assert answer.json()["model"] == "mixed"
        assert [model for _, model, _ in seen.requests] == ["raw", "chat"]


async def test_an_alias_comes_before_a_model_of_its_name_which_it_may_name_itself(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (cluster, _):
        client = cluster.client()
        server = cluster.master.server
        assert (await client.chat("chat-or-more", stream=False)).headers["x-trio-cluster-model"] == "chat"
        server.register_chat("chat-or-more", Seen().handler(lambda request: "more"))
        answer = await client.chat("chat-or-more", stream=False)
        assert answer.headers["x-trio-cluster-model"] == "chat-or-more"
        server.register_chat("talk", Seen().handler(lambda request: "hidden"))
        assert (await client.chat("talk", stream=False)).headers["x-trio-cluster-model"] == "chat"
        assert server.remove_alias("talk") is False
        server.set_aliases(None)
        assert (await client.chat("talk", stream=False)).headers["x-trio-cluster-model"] == "talk"


async def test_the_list_of_models_has_the_aliases(autojump_clock: MockClock) -> None:
    async with opened() as (cluster, _):
        client = cluster.client()
        entries = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
        assert "nothing" not in entries
        assert entries["talk"]["alias_of"] == "chat"
        assert entries["talk"]["kind"] == "chat"
        assert entries["canary"]["alias_of"] == {"chat": 0.5, "far-chat": 0.5}
        assert entries["assistant"]["alias_of"] == ["nowhere", "vectors", "chat", "far-chat"]
        assert "alias_of" not in entries["chat"]
        assert (await client.get("/v1/models/talk")).json() == entries["talk"]
        assert (await client.get("/v1/models/nothing")).error["code"] == "model_not_found"
        assert (await client.get("/ready?model=talk")).status == 200
        assert (await client.get("/ready?model=nothing")).status == 503
        kinds = {}
        for kind in ("chat", "embedding"):
            listed = (await client.get(f"/v1/models?kind={kind}")).json()["data"]
            kinds[kind] = {each["id"] for each in listed}
        # It answers as both.
        assert "assistant" in kinds["chat"] & kinds["embedding"]
        assert "talk" not in kinds["embedding"]


async def test_a_key_needs_the_alias_and_not_its_models(autojump_clock: MockClock) -> None:
    class Keys:
        async def authenticate(self, context: Any) -> Principal:
            name = (context.header(b"authorization") or b"").decode()
            return Principal(name, models=("talk", "far-listen") if name == "aliases" else ("chat",))

    async with opened(authenticator=Keys()) as (cluster, _):
        aliases, models = cluster.client(authorization="aliases"), cluster.client(authorization="models")
        assert (await aliases.chat("talk", stream=False)).status == 200
        assert (await aliases.chat("chat", stream=False)).error["code"] == "model_not_allowed"
        assert (await models.chat("chat", stream=False)).status == 200
        assert (await models.chat("talk", stream=False)).error["code"] == "model_not_allowed"
        for size in (10, 2 * SPOOL_THRESHOLD):
            body, headers = form("far-listen", size)
            path = "/v1/audio/transcriptions"
            assert (await aliases.post(path, body, headers=headers)).status == 200
            refused = await models.post(path, body, headers=headers)
            assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")
        listed = (await aliases.get("/v1/models")).json()["data"]
        assert [each["id"] for each in listed] == ["talk", "far-listen"]
        assert (await aliases.get("/v1/models/talk")).status == 200
        assert (await models.get("/v1/models/talk")).status == 403


async def test_limits_of_a_key_hold_for_an_alias_and_nothing_is_left_of_them(
    autojump_clock: MockClock,
) -> None:
    class Keys:
        async def authenticate(self, context: Any) -> Principal:
            return Principal("limited", limits=Limits(requests_per_minute=2))

    async with opened(authenticator=Keys()) as (cluster, _):
        client = cluster.client()
        assert (await client.chat("assistant", stream=False)).status == 200
        assert (await client.chat("far-talk", stream=False)).status == 200
        assert (await client.chat("talk", stream=False)).status == 429
        limiter = cluster.master.server.limiter
        assert limiter is not None
        assert limiter.open_reservations == 0


async def test_the_access_log_and_the_calls_have_both_names(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.access")
    async with opened(access_log=True) as (cluster, _):
        client = cluster.client()
        await client.chat("talk", stream=False)
        await client.chat("chat", stream=False)
    fields = [record.fields for record in caplog.records if record.name == "trio_cluster.access"]  # type: ignore[attr-defined]
    assert [(each["model"], each.get("alias")) for each in fields] == [("chat", "talk"), ("chat", None)]


async def test_a_name_beyond_ascii_is_encoded_in_the_header(autojump_clock: MockClock) -> None:
    seen = Seen()
    async with open_cluster(aliases={"a": "ä b"}) as cluster:
        cluster.master.server.register_chat("ä b", seen.handler(lambda request: "x"))
        for name in ("a", "ä b"):
            answer = await cluster.client().chat(name, stream=False)
            assert answer.headers["x-trio-cluster-model"] == "%C3%A4%20b"


async def test_errors_say_which_model_failed_once_one_was_asked(autojump_clock: MockClock) -> None:
    async with open_cluster(aliases={"a": "bad"}) as cluster:

        @cluster.master.server.chat("bad")
        async def bad(request: Any) -> str:
            raise ApiError(418, "no")

        answer = await cluster.client().chat("a", stream=False)
        assert answer.status == 418
        assert answer.headers["x-trio-cluster-model"] == "bad"
        unknown = await cluster.client().chat("b", stream=False)
        assert "x-trio-cluster-model" not in unknown.headers


async def test_aliases_can_be_added_in_code_while_the_server_runs(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        server = cluster.master.server
        server.register_chat("chat", Seen().handler(lambda request: "x"))
        client = cluster.client()
        assert (await client.chat("new", stream=False)).status == 404
        server.alias("new", "chat")
        assert (await client.chat("new", stream=False)).status == 200
        with pytest.raises(ValueError, match="in a circle: new -> other -> new"):
            server.alias("other", "new") or server.alias("new", "other")
        assert server.remove_alias("new")
        assert (await client.chat("new", stream=False)).status == 404


def test_a_circle_in_the_options_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="aliases: the aliases stand for each other in a circle"):
        ClusterServerOptions(aliases={"a": "b", "b": "a"})


# Weights


async def shares(cluster: SimulatedCluster, requests: Any, alias: str = "canary") -> list[str]:
    client = cluster.client()
    chosen = []
    for path, body, headers in requests:
        answer = await client.post(path, {"model": alias, **body}, headers=headers)
        assert answer.status == 200
        chosen.append(answer.headers["x-trio-cluster-model"])
    return chosen


def turns(first: str) -> list[Any]:
    """Return the requests of a conversation."""
    messages: list[Any] = [{"role": "system", "content": "now"}, {"role": "user", "content": first}]
    more = [*messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    return [("/v1/chat/completions", {"messages": each}, {}) for each in (messages, more)]


async def test_weights_are_kept_over_many_conversations_and_each_stays_with_its_model(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (cluster, _):
        chosen = await shares(cluster, [turn for i in range(60) for turn in turns(f"question {i}")])
        assert chosen[0::2] == chosen[1::2]
        counts = collections.Counter(chosen)
        assert 30 <= counts["chat"] <= 90


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({}, {"x-session-affinity": "{}"}),
        ({}, {"session-id": "{}"}),
        ({}, {"session_id": "{}"}),
        ({}, {"x-claude-code-session-id": "{}"}),
        ({"prompt_cache_key": "{}"}, {}),
        ({"conversation": "{}"}, {}),
        ({"conversation": {"id": "{}"}}, {}),
        # A header counts more than a field, and the field more than what is said.
        ({"prompt_cache_key": "other"}, {"x-session-affinity": "{}"}),
    ],
)
async def test_the_key_of_a_conversation_decides(
    fields: Any, headers: Any, autojump_clock: MockClock
) -> None:
    def named(template: Any, name: str) -> Any:
        return json.loads(json.dumps(template).replace("{}", name)) if template else {}

    async with opened() as (cluster, _):
        requests = [
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": f"{i} {j}"}], **named(fields, f"key{i}")},
                named(headers, f"key{i}"),
            )
            for i in range(12)
            for j in range(3)
        ]
        chosen = await shares(cluster, requests)
        for i in range(12):
            assert len(set(chosen[3 * i : 3 * i + 3])) == 1
        assert set(chosen) == {"chat", "far-chat"}


async def test_a_conversation_that_the_server_stores_stays_with_its_model(autojump_clock: MockClock) -> None:
    async with opened() as (cluster, _):
        client = cluster.client()
        chosen = []
        for i in range(10):
            before: dict[str, Any] = {}
            models = []
            for turn in ("first", "second", "third"):
                body = {"model": "canary", "input": f"{turn} {i}", **before}
                answer = await client.post("/v1/responses", body)
                assert answer.status == 200, answer.body
                models.append(answer.headers["x-trio-cluster-model"])
                before = {"previous_response_id": answer.json()["id"]}
            assert len(set(models)) == 1
            chosen.append(models[0])
        assert set(chosen) == {"chat", "far-chat"}


async def test_weights_within_a_list_are_followed_by_the_rest_of_the_list(autojump_clock: MockClock) -> None:
    async with opened() as (cluster, _):
        requests = [turns(f"question {i}")[0] for i in range(12)]
        assert set(await shares(cluster, requests, "sometimes")) == {"chat", "far-chat"}
        cluster.workers["far"].kill()
        await trio.sleep(1)
        assert set(await shares(cluster, requests, "sometimes")) == {"chat"}
