"""What ``trio-cluster top`` keeps of the events, and what keys do to it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from trio_cluster.cli.top_state import Action, LiveItems, TopState


def request(number: int, node: str = "w1", **fields: Any) -> dict[str, Any]:
    phase = fields.get("phase", "streaming")
    call = {"attempt": 1, "kind": "first", "node": node, "model": "m", "phase": phase}
    known = {
        "id": str(number), "request_id": f"r{number}", "model": "m", "alias": "", "key": "", "client": "10.0.0.1:5",
        "phase": phase, "node": node, "attempts": 1, "delivered": 0, "began": 100.0, "calls": [call],
    }  # fmt: skip
    return known | fields


def worker(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "state": "ok", "running": 1, "capacity": 2, "waiting": 0, "models": ["m"]} | fields


def shown(*requests: dict[str, Any], workers: tuple[str, ...] = ("w1", "w2")) -> TopState:
    state = TopState("http://node")
    content = {"requests": list(requests), "workers": [worker(name) for name in workers], "models": []}
    state.items.apply("snapshot", content, 0.0)
    return state


def tree(state: TopState) -> list[str]:
    return [row.key for row in state.rows()]


def test_events_are_applied() -> None:
    items = LiveItems()
    items.apply(
        "snapshot", {"requests": [request(1), request(2)], "workers": [worker("w")], "models": []}, 0.0
    )
    items.apply("upsert", {"requests": [request(1, phase="queued"), request(3)]}, 1.0)
    items.apply("remove", {"requests": ["2", "unknown"], "workers": ["w"]}, 2.0)
    assert {key: item["phase"] for key, item in items.requests.items()} == {"1": "queued", "3": "streaming"}
    assert items.workers == {}
    # The next connection begins anew.
    items.apply("snapshot", {"requests": [request(9)], "workers": [], "models": []}, 3.0)
    assert list(items.requests) == ["9"]


@pytest.mark.parametrize(
    ("event", "content"),
    [
        ("upsert", []),
        ("upsert", {"requests": None, "workers": {"a": 1}}),
        ("upsert", {"requests": [1, None, {"no": "id"}]}),
        ("upsert", {"requests": [{"id": "x", "calls": 7, "phase": None, "delivered": "much"}]}),
        ("remove", {"requests": [None, {}]}),
        ("unheard of", {"requests": [{"id": "x"}]}),
    ],
)
def test_what_is_not_understood_does_no_harm(event: str, content: Any) -> None:
    state = shown(request(1))
    state.items.apply(event, content, 1.0)
    assert "1 1" in tree(state)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    items = LiveItems()
    for tick in range(20):
        items.apply("upsert", {"requests": [request(1, delivered=tick * 250)]}, tick * 0.25)
    assert items.rate("1", 4.75) == pytest.approx(1000)
    assert items.rate("1", 60.0) == 0.0
    assert items.rate("2", 0.0) == 0.0


def test_requests_stand_under_their_nodes() -> None:
    state = shown(
        request(1), request(2, "w2"), request(3, "", phase="admitting", calls=[]), request(4, "local")
    )
    assert tree(state) == ["node local", "4 1", "node w1", "1 1", "node w2", "2 1", "node ", "3"]
    assert [row.is_last for row in state.rows() if not row.is_title] == [True] * 4


def test_a_request_with_two_attempts_stands_under_both_until_the_first_has_stopped() -> None:
    lost = {"attempt": 1, "kind": "first", "node": "w1", "model": "m", "phase": "stopping"}
    again = {"attempt": 2, "kind": "retry", "node": "w2", "model": "m", "phase": "waiting"}
    state = shown(request(1, "w2", calls=[lost, again], attempts=2))
    assert tree(state) == ["node w1", "1 1", "node w2", "1 2"]
    state.items.apply(
        "upsert", {"requests": [request(1, "w2", calls=[lost | {"phase": "over"}, again])]}, 1.0
    )
    assert tree(state) == ["node w1", "node w2", "1 2"]


def test_keys_select_and_pass_titles_by() -> None:
    state = shown(*[request(number, "w1" if number < 5 else "w2") for number in range(10)])
    keys = []
    for key in ("j", "down", "k", "end", "up", "home", "page down", "G", "j", "g", "k"):
        state.window(state.rows(), 5)
        state.press(key)
        row = state.selected()
        assert row is not None
        keys.append(row.key)
    assert keys == ["1 1", "2 1", "1 1", "9 1", "8 1", "0 1", "4 1", "9 1", "9 1", "0 1", "0 1"]


def test_the_selection_stays_with_its_request_and_is_near_when_that_has_ended() -> None:
    state = shown(*[request(number) for number in range(5)])
    state.press("j")
    state.press("j")
    state.items.apply("remove", {"requests": ["0"]}, 1.0)
    row = state.selected()
    assert row is not None
    assert row.key == "2 1"
    state.items.apply("remove", {"requests": ["2"]}, 2.0)
    row = state.selected()
    assert row is not None
    assert row.key == "3 1"
    state.items.apply("remove", {"requests": ["1", "3", "4"]}, 3.0)
    assert state.selected() is None
    assert state.press("c") is None
    assert state.message == "nothing is selected"


def test_the_selected_row_is_always_in_the_window() -> None:
    state = shown(*[request(number) for number in range(100)])
    rows = state.rows()
    for key in "j" * 60 + "k" * 50 + "GgG":
        state.press(key)
        first, index = state.window(rows, 10)
        assert first <= index < first + 10
    assert (first, index) == (91, 100)


def test_a_request_is_cancelled_after_a_question() -> None:
    state = shown(request(1))
    assert state.press("c") is None
    assert state.question == Action("cancel", "r1", "Cancel request r1?")
    # Any other key does not.
    assert state.press("c") is None
    assert (state.mode, state.message) == ("list", "not done")
    state.press("c")
    # What is asked does not change with what is selected.
    state.items.apply("remove", {"requests": ["1"]}, 1.0)
    action = state.press("y")
    assert action is not None
    assert (action.what, action.target) == ("cancel", "r1")


def test_a_worker_is_drained_after_a_question() -> None:
    state = shown(workers=("w1", "w2"))
    assert state.press("tab") is None
    state.press("j")
    assert state.press("d") is None
    assert state.mode == "question"
    action = state.press("y")
    assert action is not None
    assert (action.what, action.target) == ("drain", "w2")
    state.press("c")
    assert (state.mode, state.message) == ("list", "c cancels a request: go there with tab")


def test_what_runs_on_the_node_itself_has_no_worker_to_drain() -> None:
    state = shown(request(1, "local"))
    assert state.press("d") is None
    assert (state.mode, state.message) == ("list", "d drains a worker: select one with tab")


def test_a_filter_is_typed_kept_and_undone() -> None:
    state = shown(request(1, key="alice"), request(2, "w2", key="bob"), request(3, key="bobby"))
    for key in ("/", "B", "o", "x", "backspace", "b"):
        state.press(key)
    assert (state.mode, state.filter) == ("filter", "Bob")
    assert tree(state) == ["node w1", "3 1", "node w2", "2 1"]
    state.press("enter")
    assert (state.mode, state.filter) == ("list", "Bob")
    state.press("/")
    state.press("clear")
    state.press("escape")
    assert (state.mode, state.filter) == ("list", "Bob")
    state.press("escape")
    assert (state.filter, len(tree(state))) == ("", 5)


def test_a_story_is_asked_for_scrolled_and_left() -> None:
    state = shown(request(1))
    action = state.press("enter")
    assert action is not None
    assert (action.what, action.target, state.mode) == ("story", "r1", "story")
    state.press("j")
    assert state.story_at == 1
    assert state.press("q") is None
    assert (state.mode, state.story_of) == ("list", None)
    action = state.press("q")
    assert action is not None
    assert action.what == "quit"


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_question_that_is_asked_in_a_story_goes_back_to_it(answer: str) -> None:
    state = shown(request(1), request(2))
    story = state.press("enter")
    state.press("c")
    action = state.press(answer)
    assert (action is not None) is (answer == "y")
    assert (state.mode, state.story_of) == ("story", story)
    # And it is not what is behind the next question.
    for key in "qjc":
        state.press(key)
    assert (state.mode, state.story_of) == ("question", None)


def test_ten_thousand_requests_are_quick() -> None:
    state = shown(*[request(number, f"w{number % 50}", key=f"key{number % 7}") for number in range(10_000)])
    state.filter = "key3"
    best = 10.0
    for _ in range(5):
        began = time.thread_time()
        rows = state.rows()
        state.window(rows, 20)
        best = min(best, time.thread_time() - began)
    assert len(rows) == 10_000 // 7 + 1 + len({number % 50 for number in range(10_000) if number % 7 == 3})
    # Some 15 ms of a core; a quarter of a second is between two frames.
    assert best < 0.25
