"""The screen of ``trio-cluster top`` at fixed sizes."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

pytest.importorskip("rich", reason="the extra 'top' is not installed")

from rich.cells import cell_len
from rich.console import Console
from test_top_state import request, shown, worker

from trio_cluster.cli.top_screen import Look, duration, paint, screen, size
from trio_cluster.cli.top_state import TopState


def text_of(state: TopState, width: int = 80, height: int = 12, now: float = 112.0) -> str:
    """Return the screen as text, after a check that it fills the terminal."""
    lines = screen(state, Look(width, height, now, 4.0))
    console = Console(file=io.StringIO(), record=True, width=width, highlight=False, markup=False)
    for line in lines:
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    exported = console.export_text().split("\n")[:-1]
    assert len(lines) == height
    assert [cell_len(line.plain) for line in lines] == [width] * height
    return "\n".join(line.rstrip() for line in exported)


def busy() -> TopState:
    waiting = {
        "attempt": 1,
        "kind": "first",
        "node": "w2",
        "model": "m",
        "phase": "queued",
        "waits_for": "a slot of w2",
    }
    state = shown(
        request(1, key="alice", model="qwen", alias="good", deadline=115.0, first_output=102.5),
        request(2, "w2", phase="queued", calls=[waiting], began=111.0),
        request(3, "", phase="admitting", calls=[], began=112.5, waits_for="its body", model=""),
    )
    state.lost = ""
    state.items.apply("upsert", {"workers": [worker("w2", state="busy", waiting=3, running=2, lag=1.5)]}, 1.0)
    for tick in range(1, 5):
        content = {"requests": [request(1, key="alice", alias="good", delivered=tick * 1500)]}
        state.items.apply("upsert", content, float(tick))
    return state


def test_the_tree_at_80_columns() -> None:
    assert (
        text_of(busy())
        == """\
 Requests 3  Workers 2   http://node
1 streaming · 1 queued · 1 admitting · 0 models, 0 ready
  REQUEST       MODEL     PHASE     AGE   RATE      WHO        WAITS FOR
w1  ok  1/2 slots
└ r1            m (good)  streaming 12s   1.5 kB/s  alice
w2  busy  2/2 slots  3 waiting  lag 1.5 s
└ r2            m         queued    1.0s  -         10.0.0.1   a slot of w2
not sent to a node yet
└ r3                      admitting 0.0s  -         10.0.0.1   its body


q quit  ↑↓ select  Enter why  c cancel  d drain worker  Tab workers  / filter"""
    )


def test_the_tree_at_40_columns() -> None:
    assert (
        text_of(busy(), 40, 10)
        == """\
 Requests 3  Workers 2   http://node
1 streaming · 1 queued · 1 admitting · …
  REQUEST      MODEL    PHASE     AGE
w1  ok  1/2 slots
└ r1           m (good) streaming 12s
w2  busy  2/2 slots  3 waiting  lag 1.5…
└ r2           m        queued    1.0s
not sent to a node yet

q quit  Enter why  c cancel  Tab  /"""
    )


def test_the_workers() -> None:
    state = busy()
    states = {
        "model_states": {"m": "cold"},
        "connected_since": 50.0,
        "in_flight": 2,
        "in_flight_elsewhere": 1,
    }
    state.items.apply("upsert", {"workers": [worker("w1", **states), worker("zzz", state="asleep")]}, 1.0)
    state.press("tab")
    assert (
        text_of(state, 80, 9)
        == """\
 Requests 3  Workers 3   http://node
1 streaming · 1 queued · 1 admitting · 0 models, 0 ready
WORKER         STATE     SLOTS   QUEUE CALLS   LAG    UP     MODELS
w1             ok        1/2     0     2+1     -      62s    m (cold)
w2             busy      2/2     3     0       1.5 s  -      m
zzz            asleep    1/2     0     0       -      -      m


q quit  ↑↓ select  Enter details  d drain  Tab requests  / filter"""
    )


def test_more_columns_where_there_is_room() -> None:
    titles = text_of(busy(), 160).split("\n")[2].split()
    assert titles[-5:] == ["FOR", "ATTEMPT", "FIRST", "BYTES", "LEFT"]


def test_a_question_shows_how_to_answer_however_long_a_name_is() -> None:
    state = shown(request(1, request_id="r" * 200))
    state.press("c")
    *_, asked, keys = text_of(state, 40, 8).split("\n")
    assert asked.startswith("Cancel request rrr")
    assert asked.endswith("…  y/n")
    assert keys == "y yes  any other key no"


def test_a_lost_connection_is_shown() -> None:
    state = busy()
    state.lost = "Connection refused"
    lines = text_of(state).split("\n")
    assert lines[1] == "no connection: Connection refused; trying again"
    # What was known last stays.
    assert "└ r1" in lines[4]


def test_an_empty_screen_says_what_would_be_there() -> None:
    state = shown(workers=())
    assert "No requests" not in text_of(state)
    state.lost = ""
    assert "No requests. They are shown here" in text_of(state)
    state.press("tab")
    assert "No workers. Start one with" in text_of(state)
    state.filter = "x"
    assert "Nothing has this text in it." in text_of(state)


def test_a_story_is_broken_into_lines_and_scrolled() -> None:
    state = busy()
    state.press("enter")
    state.show_story([f"+{number}.000 s  " + "word " * 12 for number in range(10)])
    lines = text_of(state, 40, 10).split("\n")
    assert lines[2].startswith("+0.000 s  word")
    assert lines[3].startswith("    word")
    state.press("end")
    lines = text_of(state, 40, 10).split("\n")
    assert lines[6].startswith("+9.000 s")
    assert lines[7].startswith("    word")
    state.press("k")
    assert text_of(state, 40, 10).split("\n")[7].startswith("+9.000 s")


def test_what_other_machines_have_written_cannot_move_the_cursor() -> None:
    state = shown(
        request(1, request_id="r\x1b[2J\n", client="\x07:1", node="w\r1"),
        workers=("w\x1b]0;x\x07",),
    )
    state.lost = ""
    for _ in range(2):
        console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=1000)
        for line in paint(screen(state, Look(80, 12, 0.0)), console):
            assert re.sub(r"\x1b\[\d*m", "", line).isprintable()
        state.press("tab")


def test_fields_of_any_type_are_shown_somehow() -> None:
    huge = 10**400
    state = shown(request(1, began=huge, delivered=huge, attempts=huge, deadline=huge, alias=7))
    odd = worker("w1", models=[["m"], {"m": 1}, None], model_states={"m": []}, running=huge, lag=huge)
    state.items.apply("upsert", {"workers": [odd]}, 1.0)
    state.lost = ""
    for _ in range(2):
        text_of(state, 200)
        state.press("tab")


@pytest.mark.parametrize("color_system", [None, "standard"])
def test_colours_are_those_of_the_console(color_system: Any) -> None:
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="standard",
        no_color=color_system is None,
        width=1000,
    )
    painted = "".join(paint(screen(busy(), Look(80, 12, 112.0, 4.0)), console))
    assert ("\x1b[33m" in painted) is (color_system is not None)
    # What is selected can be seen without colours, too.
    assert "\x1b[7m" in painted


@pytest.mark.parametrize("height", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("width", [1, 5, 20])
def test_a_tiny_terminal_is_filled(width: int, height: int) -> None:
    text_of(busy(), width, height)


def test_wide_characters_take_two_columns() -> None:
    state = shown(request(1, request_id="要求" * 20, key="鍵" * 20))
    state.lost = ""
    text_of(state, 80, 10)
    text_of(state, 41, 10)


def test_only_visible_rows_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    state = shown(*[request(number) for number in range(10_000)])
    made: list[object] = []
    fit = "trio_cluster.cli.top_screen.fit"
    from trio_cluster.cli import top_screen

    original = top_screen.fit
    monkeypatch.setattr(fit, lambda *arguments: made.append(1) or original(*arguments))
    text_of(state, 80, 24)
    assert len(made) < 300


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-3, "0.0s"),
        (0, "0.0s"),
        (9.94, "9.9s"),
        (75, "75s"),
        (150, "2m30"),
        (3000, "50m"),
        (9000, "2h"),
        (9e5, "10d"),
    ],
)
def test_durations_are_short(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e7, "25 MB")]
)
def test_sizes_are_short(count: float, expected: str) -> None:
    assert size(count) == expected
