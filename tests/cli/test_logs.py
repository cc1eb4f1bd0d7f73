"""The log: lines for people and for machines, none of which can forge another."""

from __future__ import annotations

import io
import json
import logging
from contextvars import ContextVar
from typing import Any

import pytest
import trio

from trio_cluster.cli import logs
from trio_cluster.core.log_context import current_principal, current_request

logger = logging.getLogger("trio_cluster.test")

pytestmark = pytest.mark.usefixtures("restored_logging")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def text_line(message: str, *args: object, level: int = logging.INFO, **fields: Any) -> str:
    stream = io.StringIO()
    logs.configure("debug", "text", stream)
    logger.log(level, message, *args, extra={"fields": fields})
    return stream.getvalue()


def json_line(message: str, /, **fields: Any) -> dict[str, Any]:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    logger.info(message, extra={"fields": fields})
    (line,) = stream.getvalue().splitlines()
    entry: dict[str, Any] = json.loads(line)
    return entry


def test_a_line_of_text_has_the_time_the_level_the_message_and_the_fields() -> None:
    line = text_line("worker %s", "joined", worker="w1", models=["a", "b"], load=0.1 + 0.2)
    assert line[2] == line[5] == ":"
    assert line[8:] == " info     worker joined worker=w1 models=a,b load=0.3\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "x"', '"say \\"x\\""'),
        ("größe", "größe"),
        ("a\nb", '"a\\nb"'),
        ("\x1b[2J", '"\\u001b[2J"'),
        ([], "[]"),
        (None, "None"),
        (True, "True"),
        (7, "7"),
    ],
)
def test_one_can_see_where_a_value_ends(value: object, shown: str) -> None:
    assert text_line("m", field=value).endswith(f" m field={shown}\n")


def test_a_message_cannot_pass_for_another_line_or_control_the_terminal() -> None:
    text = text_line("hello %s", "\n12:00:00 error    forged\r\x1b[2Jx")
    (line,) = text.splitlines()
    assert line.endswith("hello \\n12:00:00 error    forged\\r\\x1b[2Jx")


def test_a_traceback_follows_its_line_indented() -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    try:
        raise KeyError("lost\n12:00:00 error forged")
    except KeyError:
        logger.exception("the handler failed", extra={"fields": {"model": "m"}})
    first, second, *_, last = stream.getvalue().splitlines()
    assert first.endswith("error    the handler failed model=m")
    assert second == "    Traceback (most recent call last):"
    assert last.startswith("    KeyError: ")


def test_a_line_of_json_is_one_object() -> None:
    entry = json_line("worker joined", worker="w1", models=("a", "b"), load=0.5)
    assert entry.pop("ts").endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "trio_cluster.test",
        "message": "worker joined",
        "worker": "w1",
        "models": ["a", "b"],
        "load": 0.5,
    }


def test_json_stays_json_whatever_the_fields_hold() -> None:
    entry = json_line(
        "a\nb", where=float("inf"), what=object, nested={"k": {1}}, text="\x1b\u2028é", flag=True
    )
    assert entry["message"] == "a\nb"
    assert entry["where"] == "inf"
    assert entry["what"] == "<class 'object'>"
    assert entry["nested"] == {"k": [1]}
    assert entry["text"] == "\x1b\u2028é"
    assert entry["flag"] is True


def test_a_field_cannot_replace_what_every_line_has() -> None:
    entry = json_line("real", message="forged", level="debug")
    assert (entry["message"], entry["level"]) == ("real", "info")


def test_json_has_the_traceback_in_a_field() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("the handler failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["traceback"].splitlines()[-1] == "KeyError: 'lost'"


def test_fields_that_are_no_mapping_are_left_out_and_do_no_harm() -> None:
    for format in logs.FORMATS:
        stream = io.StringIO()
        logs.configure("info", format, stream)
        logger.info("hello", extra={"fields": "nonsense"})
        assert "hello" in stream.getvalue()
        assert "nonsense" not in stream.getvalue()


def test_colours_are_for_terminals_that_want_them(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("info", "text", terminal)
    logger.warning("careful", extra={"fields": {"worker": "w1"}})
    assert "\x1b[33mwarning" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[0m\n")

    for variable, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            plain = Terminal()
            logs.configure("info", "text", plain)
            logger.warning("careful")
            assert "\x1b" not in plain.getvalue()

    assert "\x1b" not in text_line("careful", level=logging.WARNING)


def test_the_level_is_this_package_s_alone() -> None:
    stream = io.StringIO()
    logs.configure("debug", "text", stream)
    logger.debug("ours")
    logging.getLogger("hypercorn.error").info("theirs")
    logging.getLogger("hypercorn.error").warning("their warning")
    assert "ours" in stream.getvalue()
    assert "theirs" not in stream.getvalue()
    assert "their warning" in stream.getvalue()

    quiet = io.StringIO()
    logs.configure("error", "text", quiet)
    logger.warning("ours")
    assert quiet.getvalue() == ""


def test_configuring_again_replaces_and_does_not_double() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.configure("info", "text", first)
    logs.configure("info", "text", second)
    logger.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


@pytest.mark.parametrize(("level", "format"), [("verbose", "text"), ("INFO", "text"), ("info", "xml")])
def test_a_level_or_format_that_is_none_is_refused(level: str, format: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        logs.configure(level, format, io.StringIO())


@pytest.mark.parametrize(
    ("variable", "field"),
    [
        pytest.param(current_request, "request_id", id="request"),
        pytest.param(current_principal, "principal", id="principal"),
    ],
)
def test_the_current_request_and_its_principal_are_fields_of_each_line_that_has_no_others(
    variable: ContextVar[str], field: str
) -> None:
    assert field not in json_line("x")
    token = variable.set("the-one")
    try:
        assert json_line("x")[field] == "the-one"
        assert json_line("x", **{field: "another"})[field] == "another"
        assert text_line("x").endswith(f"x {field}=the-one\n")
        variable.set("")
        assert field not in json_line("x")
    finally:
        variable.reset(token)
    assert field not in json_line("x")


async def test_the_current_request_and_its_principal_go_with_tasks_and_into_their_threads() -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    current_request.set("the-one")
    current_principal.set("ann")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, logger.info, "in a thread")
    assert stream.getvalue().endswith("in a thread request_id=the-one principal=ann\n")
