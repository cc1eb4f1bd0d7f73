"""What the official clients send again and what they do not; the server's answers are made for that.

How often something was asked is counted where the model runs, and by the client. What comes again is a new request
in every respect: a client that waits for its turn holds nothing on the server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
from client_case import USER
from client_drivers import Answer, Client, Driver
from served import Placement, Served, chat, open_served, until

from trio_cluster import ApiError, ChatRequest

pytestmark = pytest.mark.feature("retries")

CHAT = "chat.completions.create"

#: What is sent again if it fails, and what is not.
AGAIN = (408, 409, 429, 500, 502, 503, 504)
NOT_AGAIN = (400, 401, 403, 404, 413, 415, 422)


@attrs.define
class Moody:
    """A model that fails so often, and then answers."""

    fails: int = 1
    status: int = 503
    retry_after: float | None = None
    headers: list[dict[str, str]] = attrs.field(factory=list)
    """Of each request that has come."""

    async def answer(self, request: ChatRequest) -> AsyncIterator[str]:
        """Be the handler."""
        self.headers.append(dict(request.headers))
        if len(self.headers) <= self.fails:
            raise ApiError(self.status, "not in the mood", code="moody", retry_after=self.retry_after)
        yield "at last"

    async def register(self, served: Served, name: str) -> None:
        """Serve it under that name."""
        served.back.register_chat(name, self.answer)
        await until(lambda: served.front.has_model(name))


def content(answer: Answer) -> str:
    """Return what the model has said in the end."""
    assert answer.failure is None, answer.failure
    text: str = answer.value["choices"][0]["message"]["content"]
    return text


async def ask(client: Client, model: str, **more: Any) -> Answer:
    return await client.ask(CHAT, model=model, messages=[USER], **more)


async def test_the_clients_send_again_what_may_succeed_and_nothing_else(
    served: Served, driver: Driver
) -> None:
    client = driver.client_of(served.url, max_retries=1)
    models = {status: Moody(status=status) for status in AGAIN + NOT_AGAIN}
    answers: dict[int, Answer] = {}

    async def ask_the_one(status: int) -> None:
        answers[status] = await ask(client, f"moody/{status}")

    for status, model in models.items():
        await model.register(served, f"moody/{status}")
    async with trio.open_nursery() as nursery:
        for status in models:
            nursery.start_soon(ask_the_one, status)
    assert {status: content(answers[status]) for status in AGAIN} == dict.fromkeys(AGAIN, "at last")
    assert all(answers[status].failure is not None for status in NOT_AGAIN)
    asked = {status: len(model.headers) for status, model in models.items()}
    assert asked == dict.fromkeys(AGAIN, 2) | dict.fromkeys(NOT_AGAIN, 1)
    assert asked == {status: len(answer.attempts) for status, answer in answers.items()}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_each_attempt_is_a_new_request_that_says_which_it_is(
    served: Served, driver: Driver, stream: bool
) -> None:
    model = Moody(fails=2, status=500)
    await model.register(served, "moody")
    answer = await ask(driver.client_of(served.url, max_retries=2), "moody", stream=stream)
    assert answer.failure is None
    assert [headers["x-stainless-retry-count"] for headers in model.headers] == ["0", "1", "2"]
    assert (await served.status())["calls"]["admitted"] == 3


async def test_without_retries_nothing_is_sent_again(served: Served, driver: Driver) -> None:
    model = Moody()
    await model.register(served, "moody")
    answer = await ask(driver.client_of(served.url, max_retries=0), "moody")
    assert answer.failure is not None
    assert (len(model.headers), len(answer.attempts)) == (1, 1)


@pytest.mark.parametrize("status", [429, 503])
async def test_the_clients_wait_as_long_as_they_are_told_to(
    served: Served, driver: Driver, status: int
) -> None:
    # The clients' own first pause would be half a second.
    model = Moody(fails=1, status=status, retry_after=1)
    await model.register(served, "moody")
    answer = await ask(driver.client_of(served.url, max_retries=1), "moody")
    assert content(answer) == "at last"
    assert answer.attempts[1] > 0.95


@pytest.mark.parametrize(
    ("status", "header", "attempts"),
    [(503, "false", 1), (429, "false", 1), (400, "true", 2), (422, "true", 2)],
)
async def test_the_server_may_say_whether_to_send_again(
    served: Served, driver: Driver, status: int, header: str, attempts: int
) -> None:
    asked = 0

    async def decide(call: Any) -> None:
        nonlocal asked
        asked += 1
        call.begin(status, "application/json", (("x-should-retry", header), ("retry-after-ms", "800")))
        await call.send(b'{"error": {"message": "as it says", "type": "t", "param": null, "code": "c"}}')

    served.back.register_raw("decided", decide)
    await until(lambda: served.front.has_model("decided"))
    answer = await ask(driver.client_of(served.url, max_retries=1), "decided")
    assert answer.failure is not None
    assert (answer.failure.status, answer.failure.code) == (status, "c")
    assert (asked, len(answer.attempts)) == (attempts, attempts)
    # The clients' own first pause would be half a second.
    assert attempts == 1 or answer.attempts[1] > 0.75


async def test_after_the_last_attempt_the_error_is_told(served: Served, driver: Driver) -> None:
    model = Moody(fails=10, status=429)
    await model.register(served, "moody")
    answer = await ask(driver.client_of(served.url, max_retries=1), "moody")
    assert answer.failure is not None
    assert (answer.failure.name, answer.failure.code) == ("RateLimitError", "moody")
    assert len(model.headers) == 2


async def test_a_stream_that_has_begun_is_not_sent_again(served: Served, driver: Driver) -> None:
    client = driver.client_of(served.url, max_retries=2)
    answer = await ask(client, "failing", stream=True, pieces=1, status=503)
    assert answer.failure is not None
    assert answer.failure.name == "APIError"
    assert (len(served.trace.requests), len(answer.attempts)) == (1, 1)


async def test_who_was_refused_for_want_of_a_slot_comes_again_and_gets_it(
    placement: Placement, driver: Driver
) -> None:
    options = {"max_concurrency": 1, "queue_timeout": 0}
    async with open_served(placement, **options) as served, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: served.post(json=chat("held")))
        await served.trace.started()
        refused = await ask(driver.client_of(served.url), "echo")
        client = driver.client_of(served.url, max_retries=2)
        async with client.asking(CHAT, model="echo", messages=[USER]) as asking:

            async def is_refused() -> bool:
                return bool((await served.status())["calls"]["failed"] == 2)

            await until(is_refused, within=5)
            served.trace.released.set()
            answer = await asking.answer()
    assert refused.failure is not None
    assert (refused.failure.name, refused.failure.status, refused.failure.code) == (
        "InternalServerError", 503, "over_capacity"
    )  # fmt: skip
    assert content(answer) == "a fine  day"
    assert answer.attempts[1] > 0.9


async def test_a_client_that_waits_to_come_again_can_be_given_up(served: Served, driver: Driver) -> None:
    model = Moody(fails=10, retry_after=60)
    await model.register(served, "moody")
    client = driver.client_of(served.url, max_retries=2)
    async with client.asking(CHAT, model="moody", messages=[USER]) as asking:
        await until(lambda: len(model.headers) == 1, within=5)
        await served.check_is_idle()
        await asking.abort()
        answer = await asking.answer(within=1)
    assert answer.failure is not None
    assert answer.failure.name == "aborted"
    assert len(model.headers) == 1
