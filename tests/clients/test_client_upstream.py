"""A real server at the end: what llama.cpp's own server answers is what comes out of the cluster in front of it.

Everything is asked twice, of the server itself and of a master whose worker has ``--serve openai:URL``, and both
clients have to see the same, errors included. The model is a real one, small, and cold enough to say the same twice.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import pytest
import trio
from client_case import text_of
from client_drivers import Answer, Client, Driver
from served import until

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.engines import parse_serve, serve_engine
from trio_cluster.engines._pinned_weights import WEIGHTS
from trio_cluster.engines._weights import cache_folder

pytestmark = [pytest.mark.engines, pytest.mark.feature("llama.cpp's server behind")]

CHAT = "chat.completions.create"

QUESTION: Final = [
    {"role": "user", "content": "What is the capital of France? Answer in one short sentence."}
]
ANSWER: Final = "The capital of France is Paris."

#: So that the same comes of it each time.
COLD: Final = {"model": "smollm2", "temperature": 0, "seed": 7, "cache_prompt": False}

#: What is different each time.
FLEETING: Final = {"id", "item_id", "created", "created_at", "completed_at", "timings"}


@attrs.frozen
class Upstream:
    """llama.cpp's server."""

    url: str
    process: subprocess.Popen[bytes]

    async def busy(self) -> int:
        """Return how many of its slots are busy."""
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            slots = (await http.get(f"{self.url}/slots")).json()
        return sum(slot["is_processing"] for slot in slots)

    async def becomes_busy(self, slots: int, within: float) -> None:
        """Wait until so many are."""

        async def is_so() -> bool:
            return await self.busy() == slots

        await until(is_so, within)


@contextmanager
def open_upstream() -> Iterator[Upstream]:
    """Run the server."""
    weights = WEIGHTS["smollm2"]
    model = cache_folder() / weights.folder_name / weights.files[0].name
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("llama_upstream.py")), str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield Upstream(process.stdout.readline().decode().strip(), process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def runnable() -> None:
    """Skip a test where the library or the weights are missing."""
    if find_spec("xllamacpp") is None:
        pytest.skip("needs xllamacpp; the llama extra brings it")
    if not (cache_folder() / WEIGHTS["smollm2"].folder_name).is_dir():
        pytest.skip("the weights of smollm2 are not in the cache; `trio-cluster demo --check` fetches them")


@pytest.fixture(scope="module")
def upstream(runnable: None) -> Iterator[Upstream]:
    """The server, for all tests that leave it as it is."""
    with open_upstream() as running:
        yield running


async def open_cluster(upstream: Upstream, nursery: trio.Nursery) -> str:
    """Put a cluster in front of it, and return the URL of its master."""

    def new_server(**more: Any) -> ClusterServer:
        return ClusterServer(ClusterServerOptions(server=ServerOptions(host="127.0.0.1", **more)))

    master, worker = new_server(), new_server(worker_id="w1")
    await nursery.start(master.run_as_master, 0)
    await nursery.start(worker.run_as_worker, "127.0.0.1", master.internal_port)
    await nursery.start(serve_engine, parse_serve(f"openai:{upstream.url}/v1,poll=0.2"), worker)
    await until(lambda: master.list_models() == ["smollm2"], within=10)
    assert master.url is not None
    return master.url


@attrs.frozen
class Both:
    """The same client, of the server itself and of the cluster."""

    direct: Client
    through: Client

    async def ask(self, method: str, *positional: Any, **body: Any) -> Answer:
        """Ask both the same, one after the other, see that they answer the same, and return the answer."""
        direct = await self.direct.ask(method, *positional, **body)
        through = await self.through.ask(method, *positional, **body)
        assert lasting(through) == lasting(direct)
        return through


def lasting(answer: Answer) -> tuple[Any, ...]:
    """Return all of an answer that is the same each time."""
    failure = answer.failure
    if failure is not None:
        # Only the cluster has ids for requests.
        failure = attrs.evolve(failure, request_id=None)
    return _lasting(answer.events), _lasting(answer.value), failure, answer.content_type, answer.complaints


def _lasting(value: Any) -> Any:
    if isinstance(value, list):
        return [_lasting(each) for each in value]
    if isinstance(value, dict):
        return {name: _lasting(each) for name, each in value.items() if name not in FLEETING}
    return value


@pytest.fixture
async def both(upstream: Upstream, driver: Driver, nursery: trio.Nursery) -> AsyncIterator[Both]:
    """The same client, of the server itself and of the cluster."""
    url = await open_cluster(upstream, nursery)
    yield Both(driver.client_of(upstream.url, timeout=60), driver.client_of(url, timeout=60))
    await upstream.becomes_busy(0, within=1)


async def test_a_chat_is_the_same(both: Both) -> None:
    answer = await both.ask(CHAT, messages=QUESTION, max_tokens=40, **COLD)
    [choice] = answer.value["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"
    assert (answer.value["usage"]["prompt_tokens"], answer.value["usage"]["completion_tokens"]) == (43, 8)


async def test_a_streamed_chat_is_the_same_piece_by_piece(both: Both) -> None:
    answer = await both.ask(
        CHAT,
        messages=QUESTION,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        **COLD,
    )
    assert text_of(answer.events) == ANSWER
    assert len(answer.events) > 8
    assert answer.events[-1]["usage"]["total_tokens"] == 51


async def test_logprobs_are_the_same(both: Both) -> None:
    fields: dict[str, Any] = {"messages": QUESTION, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    plain = await both.ask(CHAT, **fields, **COLD)
    streamed = await both.ask(CHAT, **fields, **COLD, stream=True)
    tokens = plain.value["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens][:2] == ["The", " capital"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    told = [event["choices"][0].get("logprobs") for event in streamed.events if event["choices"]]
    assert [token for each in told if each for token in each["content"]] == tokens


async def test_several_choices_are_the_same(both: Both) -> None:
    answer = await both.ask(CHAT, messages=QUESTION, max_tokens=10, n=2, **COLD)
    assert sorted(choice["index"] for choice in answer.value["choices"]) == [0, 1]


async def test_an_answer_of_a_given_form_is_the_same(both: Both) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = await both.ask(
        CHAT,
        messages=QUESTION,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
        **COLD,
    )
    assert json.loads(answer.value["choices"][0]["message"]["content"]).keys() == {"city"}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_completion_is_the_same(both: Both, stream: bool) -> None:
    answer = await both.ask(
        "completions.create", prompt="The capital of France is", max_tokens=8, stream=stream, **COLD
    )
    assert answer.failure is None


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_response_is_the_same(both: Both, stream: bool) -> None:
    answer = await both.ask("responses.create", input=QUESTION, max_output_tokens=40, stream=stream, **COLD)
    response = answer.events[-1]["response"] if stream else answer.value
    assert response["output"][0]["content"][0]["text"] == ANSWER


async def test_a_message_in_the_form_of_another_api_is_the_same(both: Both) -> None:
    answer = await both.ask("post", "/messages", messages=QUESTION, max_tokens=40, **COLD)
    assert answer.value["content"][0]["text"] == ANSWER


async def test_what_the_server_refuses_is_refused_in_its_own_words(both: Both) -> None:
    long = [{"role": "user", "content": "word " * 2000}]
    plain = await both.ask(CHAT, messages=long, **COLD)
    streamed = await both.ask(CHAT, messages=long, stream=True, **COLD)
    for answer in (plain, streamed):
        assert answer.failure is not None
        assert (answer.failure.name, answer.failure.type) == (
            "BadRequestError", "exceed_context_size_error"
        )  # fmt: skip


async def test_what_the_server_does_not_do_is_told_in_its_own_words(both: Both) -> None:
    answer = await both.ask("embeddings.create", model="smollm2", input="hello")
    assert answer.failure is not None
    assert (answer.failure.name, answer.failure.status) == ("InternalServerError", 501)


async def test_the_model_is_listed(both: Both) -> None:
    models = (await both.through.ask("models.list")).value
    assert [(model["id"], model["kind"]) for model in models] == [("smollm2", "any")]


@pytest.mark.parametrize("how", ["aborted", "left"])
async def test_a_client_that_leaves_a_stream_frees_the_slot(both: Both, upstream: Upstream, how: str) -> None:
    # (What is not streamed, this server finishes, whether anybody waits for it or not.)
    take = 3 if how == "left" else None
    endless = {**COLD, "messages": QUESTION, "max_tokens": 900, "ignore_eos": True, "stream": True}
    async with both.through.asking(CHAT, take=take, **endless) as asking:
        await asking.receive_until(lambda events: len(events) >= 3)
        if how == "aborted":
            assert await upstream.busy() == 1
            await asking.abort()
        await upstream.becomes_busy(0, within=1)


async def test_a_server_that_is_killed_is_no_clean_end(
    runnable: None, driver: Driver, nursery: trio.Nursery
) -> None:
    endless = {**COLD, "messages": QUESTION, "max_tokens": 900, "ignore_eos": True}
    with open_upstream() as upstream:
        client = driver.client_of(await open_cluster(upstream, nursery))
        async with (
            client.asking(CHAT, stream=True, **endless) as stream,
            client.asking(CHAT, **endless) as plain,
        ):
            await stream.receive_until(lambda events: len(events) >= 3)
            await upstream.becomes_busy(2, within=5)
            upstream.process.send_signal(signal.SIGKILL)
            answers = [await asking.answer(within=5) for asking in (stream, plain)]
    assert text_of(answers[0].events) != ""
    assert [answer.failure and answer.failure.name for answer in answers] == [
        "APIError",
        "InternalServerError",
    ]
    assert answers[1].failure is not None
    assert answers[1].failure.status == 502
