"""The screen of ``trio-cluster top``: what is known of a node, as lines of exactly the width of a terminal.

Only the rows that are visible are made. Columns that do not fit are left out, the least important first, so that the
same code serves 40 columns and 200. Needs the extra ``top``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from .admin_client import printable
from .top_state import NOWHERE, Item, Row, TopState, number, text

__all__ = ["Look", "now_of", "paint", "screen"]

#: The lines around a list: title, state, names of columns, message, keys.
_AROUND: Final = 5
_PHASES: Final = {
    "streaming": "green", "queued": "yellow", "admitting": "yellow", "uploading": "yellow", "stopping": "magenta",
}  # fmt: skip
_STATES: Final = {
    "ok": "green", "busy": "cyan", "draining": "magenta", "stalled": "bold red", "suspended": "bold red",
    "asleep": "dim", "waking": "yellow",
}  # fmt: skip
_KILO: Final = 1000.0


@attrs.frozen
class Look:
    """What a frame is made for.

    Attributes:
        width, height: columns and lines.
        now: the time of the node, in seconds since the epoch.
        monotonic: the time by which rates are measured.
        tree: the signs in front of a request: in the middle, and the last one of its node.
    """

    width: int
    height: int
    now: float
    monotonic: float = 0.0
    tree: tuple[str, str] = ("├ ", "└ ")


@attrs.frozen
class _Column:
    """A column of a list.

    Attributes:
        title: its name.
        width: its cells.
        rank: columns of a lower rank are there first.
        cell: returns the text for a row, and its style.
        grows: it takes what is left of the width.
    """

    title: str
    width: int
    rank: int
    cell: Callable[[Row, TopState, Look], tuple[str, str]]
    grows: bool = False


def screen(state: TopState, look: Look) -> list[Text]:
    """Return the lines of a frame. Synchronous."""
    lines = [_title(state, look), _state(state, look)]
    height = max(1, look.height - _AROUND)
    if state.mode == "story" or (state.mode == "question" and state.story_of is not None):
        lines += _story(state, look, height + 1)
    else:
        lines += _list(state, look, height)
    lines += [_message(state, look), _keys(state, look)]
    # A terminal may be lower than that: what is above the list goes first.
    return lines[-look.height :] if len(lines) > look.height else lines


def paint(lines: Sequence[Text], console: Console) -> list[str]:
    """Return lines with their styles as a terminal takes them. Synchronous."""
    painted = []
    for line in lines:
        with console.capture() as capture:
            console.print(line, end="", no_wrap=True, overflow="crop", soft_wrap=True)
        painted.append(capture.get())
    return painted


def fit(shown: str, width: int) -> str:
    """Return a text with exactly so many cells, with a mark if it is cut."""
    whole = cell_len(shown) <= width
    fitted: str = set_cell_size(shown, width if whole else max(0, width - 1))
    return fitted if whole or not width else f"{fitted}…"


# The lines around the list


def _title(state: TopState, look: Look) -> Text:
    tabs = Text()
    for name, count in (("requests", len(state.items.requests)), ("workers", len(state.items.workers))):
        style = "bold reverse" if state.tab == name else "dim"
        tabs.append(f" {name.capitalize()} {count} ", style)
    where = fit(f"  {printable(state.where)}", max(0, look.width - cell_len(tabs.plain)))
    return _cropped(tabs.append(where, "bold"), look.width)


def _state(state: TopState, look: Look) -> Text:
    if state.lost is None:
        return _line("connecting ...", look, "yellow")
    if state.lost:
        return Text(fit(f"no connection: {state.lost}; trying again", look.width), "bold red")
    counts = state.counts()
    shown = [f"{count} {phase}" for phase, count in sorted(counts.items(), key=lambda each: -each[1])]
    ready = sum(text(model, "state") in ("", "ready") for model in state.items.models.values())
    count = len(state.items.models)
    shown.append(f"{count} model{'' if count == 1 else 's'}, {ready} ready")
    return Text(fit(" · ".join(shown), look.width), "dim")


def _message(state: TopState, look: Look) -> Text:
    if state.mode == "question" and state.question is not None:
        # The answer must be seen, however long the name is.
        asked, answers = printable(state.question.question), "  y/n "
        room = max(0, look.width - len(answers))
        return _line(fit(asked, min(cell_len(asked), room)) + answers, look, "bold yellow")
    if state.mode == "filter":
        return _line(f"/{printable(state.filter)}_", look, "bold")
    if state.message:
        return _line(printable(state.message), look, "yellow")
    return _line(
        f"only with “{printable(state.filter)}”; Esc shows all" if state.filter else "", look, "yellow"
    )


def _keys(state: TopState, look: Look) -> Text:
    if state.mode == "question":
        return _line("y yes  any other key no", look, "dim")
    if state.mode == "filter":
        return _line("Enter keep  Esc undo", look, "dim")
    if state.mode == "story":
        return _line("q back  ↑↓ scroll" + ("  c cancel" if state.tab == "requests" else ""), look, "dim")
    if look.width < 60:
        return _line("q quit  Enter why  c cancel  Tab  /", look, "dim")
    act = "c cancel  d drain worker" if state.tab == "requests" else "d drain"
    story = "Enter why" if state.tab == "requests" else "Enter details"
    other = "workers" if state.tab == "requests" else "requests"
    return _line(f"q quit  ↑↓ select  {story}  {act}  Tab {other}  / filter", look, "dim")


def _line(shown: str, look: Look, style: str = "") -> Text:
    return Text(fit(shown, look.width), style)


# The lists


def _list(state: TopState, look: Look, height: int) -> list[Text]:
    columns = _columns(_REQUEST if state.tab == "requests" else _WORKER, look.width)
    rows = state.rows()
    first, selected = state.window(rows, height)
    indent = 2 if state.tab == "requests" else 0
    titles = "".join(fit(column.title, width) + " " for column, width in columns)
    lines = [_line(" " * indent + titles, look, "bold")]
    for index in range(first, min(len(rows), first + height)):
        row = rows[index]
        if row.is_title:
            lines.append(_node_line(row, state, look))
            continue
        line = Text(look.tree[row.is_last] if indent else "", "dim")
        for column, width in columns:
            shown, style = column.cell(row, state, look)
            line.append(fit(printable(shown), width), style)
            line.append(" ")
        line = _cropped(line, look.width)
        if index == selected:
            # Reversed as a whole, without other colours that could not be read there.
            line = Text(line.plain, "reverse")
        lines.append(line)
    if all(row.is_title for row in rows):
        lines += [_line(shown, look, "dim") for shown in _nothing(state)]
    lines += [_line("", look)] * (height + 1 - len(lines))
    return lines[: height + 1]


def _cropped(line: Text, width: int) -> Text:
    length = cell_len(line.plain)
    if length < width:
        line.append(" " * (width - length))
    elif length > width:
        line.truncate(width, overflow="ellipsis")
    return line


def _nothing(state: TopState) -> list[str]:
    if state.filter:
        return ["", "Nothing has this text in it."]
    if state.lost != "":
        return []
    if state.tab == "requests":
        return ["", "No requests. They are shown here as soon as clients send some."]
    return ["", "No workers. Start one with: trio-cluster worker HOST"]


def _node_line(row: Row, state: TopState, look: Look) -> Text:
    line = Text(printable(row.node) if row.node != NOWHERE else "not sent to a node yet", "bold")
    if row.item is not None:
        worker = row.item
        line.append("  ")
        line.append(*_worker_state(row, state, look))
        line.append(f"  {number(worker, 'running'):g}/{number(worker, 'capacity'):g} slots")
        if waiting := number(worker, "waiting"):
            line.append(f"  {waiting:g} waiting", "yellow")
        if lag := number(worker, "lag"):
            line.append(f"  lag {lag:.1f} s", "red")
    return _cropped(line, look.width)


def _columns(columns: Sequence[_Column], width: int) -> list[tuple[_Column, int]]:
    """Return the columns that fit, and their widths."""
    # The sign of the tree, and a space behind each.
    room = width - 2
    chosen: list[_Column] = []
    for column in sorted(columns, key=lambda each: each.rank):
        if column.width + 1 > room:
            break
        chosen.append(column)
        room -= column.width + 1
    growing = [column for column in chosen if column.grows]
    extra = dict.fromkeys(growing, room // len(growing)) if growing else {}
    return [(column, column.width + extra.get(column, 0)) for column in columns if column in chosen]


# The cells of a request


def _request_id(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    return text(row.item or {}, "request_id"), ""


def _model(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    request = row.item or {}
    model, alias = text(row.call or request, "model"), text(request, "alias")
    return (f"{model} ({alias})" if alias else model) or text(request, "endpoint"), ""


def _phase(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    phase = text(row.call or row.item or {}, "phase")
    return phase, _PHASES.get(phase, "")


def _age(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    return duration(look.now - number(row.item or {}, "began")), ""


def _first_output(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    counted: Item = row.call or row.item or {}
    at = number(counted, "first_output")
    return (duration(at - number(row.item or {}, "began")) if at else "-"), ""


def _rate(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    rate = state.items.rate(text(row.item or {}, "id"), look.monotonic)
    return (f"{size(rate)}/s" if rate else "-"), ""


def _delivered(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    return size(number(row.item or {}, "delivered")), ""


def _deadline(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    at = number(row.item or {}, "deadline")
    if not at:
        return "-", ""
    left = at - look.now
    return duration(max(0.0, left)), "red" if left < 5 else ""


def _who(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    request = row.item or {}
    return text(request, "key") or text(request, "client").rpartition(":")[0] or "-", ""


def _attempt(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    request = row.item or {}
    attempts, kind = number(request, "attempts"), text(row.call or {}, "kind")
    if attempts < 2:
        return "", ""
    return f"{kind.replace('_', ' ')} {number(row.call or {}, 'attempt'):g}", "yellow"


def _waits_for(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    return text(row.call or row.item or {}, "waits_for"), "yellow"


_REQUEST: Final = (
    _Column("REQUEST", 12, 0, _request_id, grows=True),
    _Column("MODEL", 8, 2, _model, grows=True),
    _Column("PHASE", 9, 1, _phase),
    _Column("AGE", 5, 1, _age),
    _Column("RATE", 9, 3, _rate),
    _Column("WHO", 10, 4, _who),
    _Column("WAITS FOR", 14, 5, _waits_for, grows=True),
    _Column("ATTEMPT", 9, 6, _attempt),
    _Column("FIRST", 6, 7, _first_output),
    _Column("BYTES", 8, 8, _delivered),
    _Column("LEFT", 6, 9, _deadline),
)


# The cells of a worker


def _worker_name(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    return row.key, "bold"


def _worker_state(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    known = text(row.item or {}, "state")
    return printable(known), _STATES.get(known, "")


def _slots(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    worker = row.item or {}
    return f"{number(worker, 'running'):g}/{number(worker, 'capacity'):g}", ""


def _queue(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    waiting = number(row.item or {}, "waiting")
    return f"{waiting:g}", "yellow" if waiting else ""


def _in_flight(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    worker = row.item or {}
    elsewhere = number(worker, "in_flight_elsewhere")
    return f"{number(worker, 'in_flight'):g}" + (f"+{elsewhere:g}" if elsewhere else ""), ""


def _lag(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    lag = number(row.item or {}, "lag")
    return (f"{lag:.1f} s", "red") if lag else ("-", "")


def _models(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    worker = row.item or {}
    models, states = worker.get("models"), worker.get("model_states")
    if not isinstance(models, list):
        return "", ""
    states = states if isinstance(states, Mapping) else {}
    shown = [
        f"{name} ({states[name]})" if states.get(name, "ready") != "ready" else name
        for name in map(str, models)
    ]
    return ", ".join(shown), ""


def _connected(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    since = number(row.item or {}, "connected_since")
    return (duration(look.now - since) if since else "-"), ""


def _address(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    return text(row.item or {}, "address"), ""


def _version(row: Row, state: TopState, look: Look) -> tuple[str, str]:
    return text(row.item or {}, "version"), ""


_WORKER: Final = (
    _Column("WORKER", 14, 0, _worker_name),
    _Column("STATE", 9, 1, _worker_state),
    _Column("SLOTS", 7, 2, _slots),
    _Column("QUEUE", 5, 3, _queue),
    _Column("CALLS", 7, 5, _in_flight),
    _Column("LAG", 6, 6, _lag),
    _Column("UP", 6, 7, _connected),
    _Column("MODELS", 12, 4, _models, grows=True),
    _Column("ADDRESS", 21, 8, _address),
    _Column("VERSION", 8, 9, _version),
)


# A story


def _story(state: TopState, look: Look, height: int) -> list[Text]:
    lines: list[str] = []
    for line in state.story or ["..."]:
        lines += _wrapped(line, look.width)
    state.story_at = max(0, min(state.story_at, len(lines) - height))
    shown = [_line(line, look) for line in lines[state.story_at : state.story_at + height]]
    return shown + [_line("", look)] * (height - len(shown))


def _wrapped(line: str, width: int) -> list[str]:
    """Return a line as lines that fit, the later ones indented."""
    wrapped, rest, indent = [], line, ""
    while cell_len(indent + rest) > width:
        room = max(1, width - len(indent))
        part = rest[:room]
        while cell_len(part) > room:
            part = part[:-1]
        at = part.rfind(" ")
        cut = at + 1 if at > room // 2 else max(1, len(part))
        wrapped.append(indent + rest[:cut].rstrip())
        rest, indent = rest[cut:], "    " if width >= 20 else ""
    return [*wrapped, indent + rest]


# Values


def duration(seconds: float) -> str:
    """Return a duration in at most six characters."""
    if not 0 <= seconds < 1e8:
        return "-" if seconds > 0 else "0.0s"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 100:
        return f"{whole}s"
    if whole < 6000:
        return f"{whole // 60}m{whole % 60:02}" if whole < 600 else f"{whole // 60}m"
    return f"{whole // 3600}h" if whole < 360_000 else f"{whole // 86400}d"


def size(count: float) -> str:
    """Return a number of bytes in at most seven characters."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if count < _KILO:
            break
        count, unit = count / _KILO, larger
    return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"


def now_of(state: TopState) -> float:
    """Return the time of the node's clock, in seconds since the epoch."""
    return time.time() + state.clock_ahead
