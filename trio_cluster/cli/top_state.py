"""What ``trio-cluster top`` knows and shows, without a terminal: the items of a node, the selection, and what keys do.

The items were written by another machine, so nothing in them is trusted to be there or to be of the right type. Events
and keys change the state; a frame is drawn of it (``top_screen.py``), at other times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import attrs

from ..core.live_state import LIVE_KINDS

__all__ = [
    "NOWHERE",
    "Action",
    "Item",
    "LiveItems",
    "Mode",
    "Row",
    "Tab",
    "TopState",
    "number",
    "text",
]

Item: TypeAlias = Mapping[str, Any]
Tab: TypeAlias = Literal["requests", "workers"]
#: What keys are for: the list; the answer to a question; the text of the filter; a story.
Mode: TypeAlias = Literal["list", "question", "filter", "story"]

#: Seconds over which the rate of a request is measured, about.
_RATE_TIME: Final = 2.0
#: More lines than any story has.
_MANY: Final = 1_000_000
#: A number that no node has reason to send. Much larger integers could not be calculated with.
_TOO_LARGE: Final = 1e18
#: Where requests are that no node has yet.
NOWHERE: Final = ""


def text(item: Item, field: str) -> str:
    """Return a field of an item that is to be a text; empty if it is none."""
    value = item.get(field)
    return value if isinstance(value, str) else ""


def number(item: Item, field: str) -> float:
    """Return a field of an item that is to be a number; 0 if it is none, or larger than any that is meant."""
    value = item.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return 0
    return value if abs(value) < _TOO_LARGE else 0


def calls_of(request: Item) -> list[Item]:
    """Return the attempts of a request."""
    calls = request.get("calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []


class LiveItems:
    """The items of a node, as its events have them, and how fast its answers are.

    Attributes:
        requests, workers, models: by their ids.
        changes: how many events were applied.
    """

    def __init__(self) -> None:
        self.requests: dict[str, Item] = {}
        self.workers: dict[str, Item] = {}
        self.models: dict[str, Item] = {}
        self.changes = 0
        # For each request: when its rate was measured last, how much was delivered then, and the rate.
        self._rates: dict[str, tuple[float, float, float]] = {}

    def apply(self, event: str, content: Any, now: float) -> None:
        """Apply an event. Synchronous.

        Args:
            event: its name. One that is not known changes nothing.
            content: its content.
            now: the time, in seconds, of any clock.
        """
        if not isinstance(content, Mapping):
            return
        self.changes += 1
        if event == "snapshot":
            self.requests, self.workers, self.models, self._rates = {}, {}, {}, {}
        for kind in LIVE_KINDS:
            items = content.get(kind)
            if not isinstance(items, list):
                continue
            known: dict[str, Item] = getattr(self, kind)
            if event == "remove":
                for key in items:
                    known.pop(str(key), None)
                    if kind == "requests":
                        self._rates.pop(str(key), None)
            elif event in ("snapshot", "upsert"):
                for item in items:
                    if isinstance(item, Mapping) and "id" in item:
                        known[str(item["id"])] = item
                        if kind == "requests":
                            self._measure(str(item["id"]), number(item, "delivered"), now)

    def rate(self, key: str, now: float) -> float:
        """Return the bytes per second that a client takes of an answer."""
        at, _, rate = self._rates.get(key, (now, 0.0, 0.0))
        # Nothing is sent of an answer that stands still.
        return rate if now - at < 2 * _RATE_TIME else 0.0

    def _measure(self, key: str, delivered: float, now: float) -> None:
        known = self._rates.get(key)
        if known is None or delivered < known[1]:
            self._rates[key] = now, delivered, 0.0
        elif (seconds := now - known[0]) > 0 and delivered > known[1]:
            rate, weight = (delivered - known[1]) / seconds, min(1.0, seconds / _RATE_TIME)
            self._rates[key] = now, delivered, rate if not known[2] else known[2] + (rate - known[2]) * weight


@attrs.frozen
class Row:
    """A line of a list.

    Attributes:
        key: tells it from all others.
        item: the request or the worker; of the title of a node its worker, if it is known.
        node: where a request is, or what the title is of; :data:`NOWHERE` for requests that no node has yet.
        call: the attempt of a request that this line is of; ``None``: there is none yet.
        is_title: it is the title of a node, and cannot be selected.
        is_last: it is the last request of its node.
    """

    key: str
    item: Item | None
    node: str = NOWHERE
    call: Item | None = None
    is_title: bool = False
    is_last: bool = False


@attrs.frozen
class Action:
    """What is to be done, and what is asked before."""

    what: Literal["cancel", "drain", "story", "quit", "redraw"]
    target: str = ""
    """The id of a request, or the name of a worker."""
    question: str = ""


class TopState:
    """Everything that is shown. Synchronous.

    Args:
        where: the node, for people.

    Attributes:
        items: of the node.
        tab: which list is shown.
        mode: what keys are for.
        filter: only what has this text in it is shown.
        lost: why there is no connection; empty if there is one, ``None`` if none was made yet.
        message: what has come of the last action.
        question: what is asked, in the mode ``question``.
        story: the lines of a story, in the mode ``story``; ``story_of`` is its request or worker.
        story_at: the first line of it that is shown.
        clock_ahead: by how many seconds the clock of the node is ahead of the one here.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.items = LiveItems()
        self.tab: Tab = "requests"
        self.mode: Mode = "list"
        self.filter = ""
        self.lost: str | None = None
        self.message = ""
        self.question: Action | None = None
        self.story: list[str] = []
        self.story_of: Action | None = None
        self.story_at = 0
        self.clock_ahead = 0.0
        self._selected: dict[Tab, str] = {"requests": "", "workers": ""}
        self._index: dict[Tab, int] = {"requests": 0, "workers": 0}
        self._first: dict[Tab, int] = {"requests": 0, "workers": 0}
        self._page = 10
        # Keys come faster than events, and there may be thousands of rows.
        self._rows: list[Row] = []
        self._rows_of: object = None
        self._filter_before = ""

    # What is shown

    def rows(self) -> list[Row]:
        """Return the lines of the list, from its first one on. Not to be changed."""
        made_of = self.items.changes, self.tab, self.filter
        if made_of != self._rows_of:
            self._rows = list(self._request_rows() if self.tab == "requests" else self._worker_rows())
            self._rows_of = made_of
        return self._rows

    def window(self, rows: Sequence[Row], height: int) -> tuple[int, int]:
        """Return the number of the first of the rows that are shown, and that of the selected one; -1: there is none.

        Args:
            rows: all of them.
            height: how many can be shown.
        """
        self._page = max(1, height - 1)
        index = self._find_selected(rows)
        first = min(self._first[self.tab], max(0, len(rows) - height))
        if index >= 0:
            # With the title of its node, if that is the row above.
            above = index - 1 if index and rows[index - 1].is_title else index
            first = min(first, above)
            first = max(first, index - height + 1)
        self._first[self.tab] = first
        return first, index

    def selected(self) -> Row | None:
        """Return the selected row; ``None`` if there is none."""
        rows = self.rows()
        index = self._find_selected(rows)
        return None if index < 0 else rows[index]

    def counts(self) -> dict[str, int]:
        """Return how many requests there are in each phase."""
        counts: dict[str, int] = {}
        for request in self.items.requests.values():
            phase = text(request, "phase")
            counts[phase] = counts.get(phase, 0) + 1
        return counts

    def _request_rows(self) -> Iterator[Row]:
        nodes: dict[str, list[Row]] = {name: [] for name in sorted(self.items.workers)}
        wanted = self.filter.lower()
        for key, request in self.items.requests.items():
            if wanted and wanted not in _haystack(request):
                continue
            # Those whose work goes on: of a hedge two, and the old one of a retry until it has stopped.
            calls = [call for call in calls_of(request) if text(call, "phase") != "over"]
            if not calls:
                nodes.setdefault(text(request, "node"), []).append(Row(key, request, text(request, "node")))
            for call in calls:
                node = text(call, "node")
                row = Row(f"{key} {number(call, 'attempt'):g}", request, node, call)
                nodes.setdefault(node, []).append(row)
        for node, rows in sorted(nodes.items(), key=lambda entry: (entry[0] == NOWHERE, entry[0])):
            worker = self.items.workers.get(node)
            if not rows and (wanted or worker is None):
                continue
            yield Row(f"node {node}", worker, node, is_title=True)
            for row in rows[:-1]:
                yield row
            if rows:
                yield attrs.evolve(rows[-1], is_last=True)

    def _worker_rows(self) -> Iterator[Row]:
        wanted = self.filter.lower()
        for name, worker in sorted(self.items.workers.items()):
            models = worker.get("models")
            names = " ".join(map(str, models)) if isinstance(models, list) else ""
            if not wanted or wanted in f"{name} {names} {text(worker, 'state')}".lower():
                yield Row(name, worker, name)

    def _find_selected(self, rows: Sequence[Row]) -> int:
        """Return the number of the selected row. If it is gone, that of one near to it, which is selected then."""
        selected = self._selected[self.tab]
        for index, row in enumerate(rows):
            if row.key == selected and not row.is_title:
                self._index[self.tab] = index
                return index
        return self._select(rows, self._index[self.tab], 1)

    def _select(self, rows: Sequence[Row], index: int, step: int) -> int:
        """Select a row, or the next one in a direction, or in the other; return its number."""
        if not rows:
            return -1
        index = max(0, min(index, len(rows) - 1))
        ahead = range(index, len(rows) if step > 0 else -1, step)
        behind = range(index, -1 if step > 0 else len(rows), -step)
        for each in (*ahead, *behind):
            if not rows[each].is_title:
                self._selected[self.tab], self._index[self.tab] = rows[each].key, each
                return int(each)
        return -1

    # Keys

    def press(self, key: str) -> Action | None:
        """React to a key.

        Returns:
            What is to be done besides; ``None``: nothing.
        """
        if key == "redraw":
            return Action("redraw")
        match self.mode:
            case "question":
                return self._press_in_question(key)
            case "filter":
                return self._press_in_filter(key)
            case "story":
                return self._press_in_story(key)
            case "list":
                return self._press_in_list(key)

    def show_story(self, lines: Sequence[str]) -> None:
        """Show the lines of a story, in the place of those that were shown."""
        self.story = list(lines)

    def _press_in_list(self, key: str) -> Action | None:
        self.message = ""
        if key in ("q", "Q"):
            return Action("quit")
        if key in ("tab", "back tab", "left", "right"):
            self.tab = "workers" if self.tab == "requests" else "requests"
        elif key in _MOVES:
            rows = self.rows()
            move = _MOVES[key]
            index = self._find_selected(rows)
            self._select(
                rows, move(index, self._page, len(rows)), 1 if move(index, 1, len(rows)) > index else -1
            )
        elif key == "/":
            self.mode, self._filter_before = "filter", self.filter
        elif key == "escape":
            self.filter = ""
        elif key in ("c", "d", "enter"):
            return self._begin(key)
        return None

    def _begin(self, key: str) -> Action | None:
        row = self.selected()
        if row is None or row.item is None:
            self.message = "nothing is selected"
        elif key == "enter":
            self.mode, self.story, self.story_at = "story", [], 0
            target = text(row.item, "request_id") if self.tab == "requests" else row.key
            self.story_of = Action("story", target)
            return self.story_of
        elif key == "c":
            if self.tab != "requests":
                self.message = "c cancels a request: go there with tab"
                return None
            request_id = text(row.item, "request_id")
            self.mode = "question"
            self.question = Action("cancel", request_id, f"Cancel request {request_id}?")
        else:
            # In the list of requests, that of the selected request.
            worker = row.node
            if worker not in self.items.workers:
                self.message = "d drains a worker: select one with tab"
                return None
            self.mode = "question"
            self.question = Action(
                "drain", worker, f"Drain worker {worker}? It finishes its requests and stops."
            )
        return None

    def _press_in_question(self, key: str) -> Action | None:
        question, self.question = self.question, None
        self.mode = "list" if self.story_of is None else "story"
        if key in ("y", "Y"):
            return question
        self.message = "not done"
        return None

    def _press_in_filter(self, key: str) -> Action | None:
        if key == "enter":
            self.mode = "list"
        elif key == "escape":
            self.mode, self.filter = "list", self._filter_before
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif key == "clear":
            self.filter = ""
        elif len(key) == 1:
            self.filter += key
        elif key in _MOVES:
            self.mode = "list"
            return self._press_in_list(key)
        return None

    def _press_in_story(self, key: str) -> Action | None:
        if key in ("q", "escape", "enter", "left"):
            self.mode, self.story_of = "list", None
        elif key in _MOVES:
            # How many lines it has is known when these are broken to the width of the screen, which corrects this.
            self.story_at = max(0, _MOVES[key](self.story_at, self._page, _MANY))
        elif key == "c" and self.story_of is not None and self.tab == "requests":
            request_id = self.story_of.target
            self.mode = "question"
            self.question = Action("cancel", request_id, f"Cancel request {request_id}?")
        return None


#: Where a key moves to, from a number, given how many there are on a page and in total.
_MOVES: Final[dict[str, Callable[[int, int, int], int]]] = {
    "up": lambda at, page, count: at - 1,
    "k": lambda at, page, count: at - 1,
    "down": lambda at, page, count: at + 1,
    "j": lambda at, page, count: at + 1,
    "page up": lambda at, page, count: at - page,
    "page down": lambda at, page, count: at + page,
    " ": lambda at, page, count: at + page,
    "half down": lambda at, page, count: at + page // 2,
    "home": lambda at, page, count: 0,
    "g": lambda at, page, count: 0,
    "end": lambda at, page, count: count - 1,
    "G": lambda at, page, count: count - 1,
}


def _haystack(request: Item) -> str:
    """Return the text in which a filter is looked for."""
    fields = ("request_id", "model", "alias", "key", "client", "node", "phase", "endpoint", "waits_for")
    return " ".join([text(request, field) for field in fields]).lower()
