"""What requests are estimated to use."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from trio_cluster.core.answer import Usage
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.principal import Principal
from trio_cluster.core.request import Request
from trio_cluster.limits.account import MOST_TOKENS, Demand
from trio_cluster.limits.estimate import MEDIA_TOKENS, UNKNOWN_ANSWER, Estimator

TEMPLATE = 16


def request(fields: dict[str, Any], kind: Any = "chat", *, parsed: bool = True) -> Request:
    body = json.dumps(fields).encode()
    return Request(
        "chat.completions",
        kind,
        "m",
        body,
        parsed=SimpleNamespace(raw=fields) if parsed else None,
        principal=Principal("k"),
    )


@pytest.mark.parametrize("parsed", [True, False])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_the_named_length_counts(field: str, parsed: bool) -> None:
    asked = request({"messages": "x" * 100, field: 50}, parsed=parsed)
    demand = Estimator().estimate(asked)
    assert demand.prompt == TEMPLATE + len(asked.body) // 2
    assert demand.tokens == demand.prompt + 50
    assert 50 < demand.least < 50 + demand.prompt


def test_of_each_of_several_answers_and_prompts() -> None:
    demand = Estimator().estimate(request({"max_tokens": 10, "n": 3, "prompt": ["a", "b"]}))
    assert demand.tokens - demand.prompt == 60
    tokens = Estimator().estimate(request({"max_tokens": 10, "prompt": [1, 2, 3]}))
    assert tokens.tokens - tokens.prompt == 10


def test_a_number_of_any_length_is_one_that_can_be_counted() -> None:
    for fields in ({"max_tokens": 10**400}, {"max_tokens": 2**50, "n": 2**50}):
        demand = Estimator().estimate(request(fields))
        assert (demand.tokens, demand.least) == (MOST_TOKENS, MOST_TOKENS)


@pytest.mark.parametrize("length", [None, "many", -1, True, 0, 1.5])
def test_without_a_length_it_is_a_guess(length: Any) -> None:
    demand = Estimator().estimate(request({"max_tokens": length}))
    assert demand.tokens - demand.prompt == UNKNOWN_ANSWER
    assert demand.least < demand.prompt


def test_a_body_that_is_not_json_here() -> None:
    for body in (b"not json", b'{"n":"\xff"' + b"}"):
        demand = Estimator().estimate(Request("x", "any", "m", body))
        assert demand.tokens == TEMPLATE + len(body) // 2 + UNKNOWN_ANSWER


def test_what_has_no_answer_or_no_tokens() -> None:
    for kind in ("embedding", "rerank", "moderation"):
        demand = Estimator().estimate(request({"input": "x" * 100, "max_tokens": 5}, kind))
        assert demand.tokens == demand.prompt > 50
    for kind in ("tts", "asr", "image_generation", "image_edit"):
        assert Estimator().estimate(request({"input": "x" * 100}, kind)).tokens == 0
    upload = Request("x", "any", "m", b"", upload=ByteChannel(10_000_000))
    assert Estimator().estimate(upload).prompt == TEMPLATE


def test_what_answers_usually_have_is_learnt() -> None:
    estimator, asked = Estimator(), request({"messages": "x" * 984})
    for number in range(100):
        estimator.learn(asked, Usage(prompt_tokens=116, completion_tokens=10 if number % 8 else 300))
    demand = estimator.estimate(asked)
    assert demand.tokens - demand.prompt == 300
    assert demand.prompt == pytest.approx(TEMPLATE + 1.25 * 100, abs=1)
    # Not of other models, nor of other keys.
    other = Request("chat.completions", "chat", "m2", asked.body, principal=Principal("k"))
    assert estimator.estimate(other).tokens - estimator.estimate(other).prompt == UNKNOWN_ANSWER


def test_a_named_length_counts_more_than_what_was_learnt() -> None:
    estimator, asked = Estimator(), request({"max_tokens": 1000})
    for _ in range(20):
        estimator.learn(asked, Usage(prompt_tokens=5, completion_tokens=10))
    assert estimator.estimate(asked).tokens >= 1000


def test_images_and_audio_are_not_text() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    audio = {"type": "input_audio", "input_audio": {"data": "A" * 400_000, "format": "wav"}}
    asked = request({"messages": [{"role": "user", "content": [image, audio, "x" * 1000]}]})
    demand = Estimator().estimate(asked)
    assert 2 * MEDIA_TOKENS + 500 < demand.prompt < 2 * MEDIA_TOKENS + 1000


def test_a_large_body_is_not_searched_for_long() -> None:
    many = {"messages": [{"role": "user", "content": list(range(200_000))} for _ in range(5)]}
    deep: Any = "x"
    for _ in range(50_000):
        deep = [deep]
    asked = request(many)
    for fields in (many, {"messages": [{"a": "b"}] * 9_000}, {"messages": deep}):
        large = Request("x", "chat", "m", asked.body, parsed=SimpleNamespace(raw=fields))
        began = time.process_time()
        assert Estimator().estimate(large).prompt == TEMPLATE + len(asked.body) // 2
        assert time.process_time() - began < 0.05


async def test_a_large_body_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    estimator = Estimator()

    def estimate(asked: Request) -> Demand:
        threads.append(threading.current_thread() is threading.main_thread())
        return Demand(1)

    monkeypatch.setattr(estimator, "estimate", estimate)
    for size in (10, 2_000_000):
        assert (await estimator.estimate_request(Request("x", "any", "m", bytes(size)))).tokens == 1
    assert threads == [True, False]


def test_to_count_tokens_costs_none() -> None:
    asked = Request("/messages/count_tokens", "custom", "m", b'{"messages": []}')
    assert Estimator().estimate(asked).tokens == 0


def test_what_is_remembered_is_bounded() -> None:
    estimator = Estimator()
    for number in range(5000):
        asked = Request("x", "chat", f"m{number}", b"{}")
        estimator.learn(asked, Usage(1, 1))
    assert len(estimator._recent) == 4096
