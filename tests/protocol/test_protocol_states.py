"""The tables of call states, and that sessions follow them, cell by cell."""

from __future__ import annotations

from typing import Any

import pytest
from protocol_link import Link, open_link

from trio_cluster.errors import ApiError
from trio_cluster.protocol import (
    RECEIVE_TRANSITIONS,
    SEND_TRANSITIONS,
    Cancel,
    Data,
    Done,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Message,
    ProtocolError,
    Role,
    State,
    encode,
    markdown,
)

# Written out once more, and not computed: this is the protocol. The documentation shows the same tables.
TABLES = {
    "master sends": """
| | ForwardRequest | Data | LastData | Cancel | Grant |
| --- | --- | --- | --- | --- | --- |
| **IDLE** | UPLOADING | · | · | · | · |
| **UPLOADING** | · | UPLOADING | WAITING | CANCELLING | · |
| **WAITING** | · | · | · | CANCELLING | · |
| **EARLY** | · | EARLY | ANSWERING | CANCELLING | EARLY |
| **ANSWERING** | · | · | · | CANCELLING | ANSWERING |
""",
    "master receives": """
| | ForwardResponse | Data | Done | Failed | Grant |
| --- | --- | --- | --- | --- | --- |
| **UPLOADING** | EARLY | · | · | ENDED | UPLOADING |
| **WAITING** | ANSWERING | · | · | ENDED | WAITING |
| **EARLY** | · | EARLY | ENDED | ENDED | EARLY |
| **ANSWERING** | · | ANSWERING | ENDED | ENDED | ANSWERING |
| **CANCELLING** | CANCELLING | CANCELLING | ENDED | ENDED | CANCELLING |
""",
    "worker sends": """
| | ForwardResponse | Data | Done | Failed | Grant |
| --- | --- | --- | --- | --- | --- |
| **UPLOADING** | EARLY | · | · | ENDED | UPLOADING |
| **WAITING** | ANSWERING | · | · | ENDED | · |
| **EARLY** | · | EARLY | ENDED | ENDED | EARLY |
| **ANSWERING** | · | ANSWERING | ENDED | ENDED | · |
| **CANCELLING** | · | · | ENDED | ENDED | · |
""",
    "worker receives": """
| | ForwardRequest | Data | LastData | Cancel | Grant |
| --- | --- | --- | --- | --- | --- |
| **IDLE** | UPLOADING | · | · | · | · |
| **UPLOADING** | · | UPLOADING | WAITING | CANCELLING | · |
| **EARLY** | · | EARLY | ANSWERING | CANCELLING | EARLY |
| **WAITING** | · | · | · | CANCELLING | · |
| **ANSWERING** | · | · | · | CANCELLING | ANSWERING |
| **ENDED** | · | ENDED | ENDED | ENDED | ENDED |
""",
}


def cells(rendered: str) -> dict[tuple[str, str], str]:
    """Read a Markdown table back."""
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in rendered.strip().splitlines()
    ]
    columns = rows[0][1:]
    assert all(cell == "---" for cell in rows[1])
    return {
        (row[0], column): cell
        for row in rows[2:]
        for column, cell in zip(columns, row[1:], strict=True)
        if cell != "·"
    }


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
@pytest.mark.parametrize(
    ("verb", "tables"),
    [("sends", SEND_TRANSITIONS), ("receives", RECEIVE_TRANSITIONS)],
    ids=["sends", "receives"],
)
def test_the_tables_are_those_of_protocol_1(role: Role, verb: str, tables: Any) -> None:
    rendered = markdown(tables[role])
    assert cells(rendered) == cells(TABLES[f"{role.value} {verb}"])
    assert cells(rendered) == {
        (before.value, message.__name__): after.value for (before, message), after in tables[role].items()
    }


def test_a_rendered_table_is_markdown_with_its_rows_in_the_order_of_a_calls_life() -> None:
    assert markdown(SEND_TRANSITIONS[Role.MASTER]) == TABLES["master sends"].lstrip()


def in_state(role: Role, state: State) -> tuple[Link, int]:
    """Return a link whose end of ``role`` has a call in ``state``, with credit outstanding both ways."""
    link = open_link()
    if state is State.IDLE:
        return link, 1
    call = link.open(None)
    link.settle()
    if state in (State.WAITING, State.ANSWERING):
        link.master.send_body(call, b"body", last=True)
        link.settle()
    if state in (State.EARLY, State.ANSWERING, State.ENDED):
        link.worker.respond(call, 200, "text/plain")
        link.worker.send(call, b"piece")
        link.settle()
    if state is State.ENDED:
        link.worker.done(call)
        link.settle()
    if state is State.CANCELLING:
        link.master.cancel(call, "enough")
        link.settle()
    session = link.master if role is Role.MASTER else link.worker
    assert session.state(call) is state
    return link, call


def received(kind: str, call: int) -> Message:
    messages: dict[str, Message] = {
        "ForwardRequest": ForwardRequest(call, "e", "chat", "m", "", {}, "", None, None, -1),
        "ForwardResponse": ForwardResponse(call, 200, "text/plain"),
        "Data": Data(call, b"data"),
        "LastData": Data(call, b"data", True),
        "Done": Done(call),
        "Failed": Failed(call, 500, "no", "server_error", None, None, None),
        "Cancel": Cancel(call, "enough"),
        "Grant": Grant(call, 1),
    }
    return messages[kind]


KINDS = ["ForwardRequest", "ForwardResponse", "Data", "LastData", "Done", "Failed", "Cancel", "Grant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_receiving_leads_to_the_state_in_the_cell_and_an_empty_cell_ends_the_session(
    role: Role, state: State, kind: str
) -> None:
    link, call = in_state(role, state)
    session: Any = link.master if role is Role.MASTER else link.worker
    if kind == "Grant" and (state.value, kind) in cells(TABLES[f"{role.value} receives"]):
        # Credit can be granted only for what was sent before.
        if role is Role.MASTER:
            if state in (State.UPLOADING, State.EARLY):
                link.master.send_body(call, b"x")
        elif state is not State.ENDED:
            link.worker.send(call, b"x")
        while session.next_message() is not None:
            pass
    data = encode([received(kind, call)])
    next_state = cells(TABLES[f"{role.value} receives"]).get((state.value, kind))
    if next_state is None:
        with pytest.raises(ProtocolError) as caught:
            session.receive(data, 0.0)
        assert caught.value.reason == f"{kind} for call {call}, which is {state.value}"
        assert session.close_reason == caught.value.reason
        assert session.next_message() is None
    else:
        events = session.receive(data, 0.0)
        assert session.state(call).value == next_state
        ignored = (
            kind == "Grant"
            or next_state == "CANCELLING" == state.value
            or next_state == "ENDED" == state.value
        )
        assert events == ([] if ignored else [received(kind, call)])


def send(link: Link, role: Role, kind: str, call: int) -> None:
    """Send a message of this kind at the end of ``role``."""
    if role is Role.MASTER:
        {
            "Data": lambda: link.master.send_body(call, b"data"),
            "LastData": lambda: link.master.send_body(call, b"data", last=True),
            "Cancel": lambda: link.master.cancel(call, "enough"),
        }[kind]()
    else:
        {
            "ForwardResponse": lambda: link.worker.respond(call, 200, "text/plain"),
            "Data": lambda: link.worker.send(call, b"data"),
            "Done": lambda: link.worker.done(call),
            "Failed": lambda: link.worker.fail(call, ApiError(500, "no")),
        }[kind]()


# What a session ignores instead of raising, because its caller cannot know better.
IGNORED = {
    ("master", "CANCELLING", "Data"),
    ("master", "CANCELLING", "LastData"),
    ("master", "CANCELLING", "Cancel"),
    ("master", "ENDED", "Data"),
    ("master", "ENDED", "LastData"),
    ("master", "ENDED", "Cancel"),
    ("worker", "CANCELLING", "ForwardResponse"),
    ("worker", "CANCELLING", "Data"),
}


@pytest.mark.parametrize(
    ("role", "kind"),
    [(Role.MASTER, kind) for kind in ("Data", "LastData", "Cancel")]
    + [(Role.WORKER, kind) for kind in ("ForwardResponse", "Data", "Done", "Failed")],
    ids=lambda part: part.value if isinstance(part, Role) else part,
)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_sending_leads_to_the_state_in_the_cell_and_an_empty_cell_is_an_error_of_the_caller(
    role: Role, state: State, kind: str
) -> None:
    link, call = in_state(role, state)
    session = link.master if role is Role.MASTER else link.worker
    next_state = cells(TABLES[f"{role.value} sends"]).get((state.value, kind))
    if next_state is not None:
        send(link, role, kind, call)
        assert session.state(call).value == next_state
        assert session.next_message() is not None
        return
    if (role.value, state.value, kind) in IGNORED:
        send(link, role, kind, call)
    else:
        with pytest.raises(RuntimeError, match=f"call {call}"):
            send(link, role, kind, call)
    # Nothing has changed.
    assert session.state(call) is state
    assert session.next_message() is None
    assert session.close_reason is None


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_credit_is_granted_only_where_the_peer_has_something_to_send(role: Role, state: State) -> None:
    # At the worker, ENDED and CANCELLING come from UPLOADING or EARLY, so a body would still be coming.
    link, call = in_state(role, state)
    session = link.master if role is Role.MASTER else link.worker
    if state is State.IDLE:
        with pytest.raises(RuntimeError, match="never opened"):
            session.grant(call, 0)
        return
    sender: Any = link.worker if role is Role.MASTER else link.master
    feeds = (State.EARLY, State.ANSWERING) if role is Role.MASTER else (State.UPLOADING, State.EARLY)
    if state in feeds:
        (sender.send if role is Role.MASTER else sender.send_body)(call, bytes(65536))
        link.settle()
        session.grant(call, 65536)
    else:
        session.grant(call, 0)
    batch = session.next_message()
    assert (batch is not None) == (state in feeds)
    assert ((state.value, "Grant") in cells(TABLES[f"{role.value} sends"])) == (state in feeds)
