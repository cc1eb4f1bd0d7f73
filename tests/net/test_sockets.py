"""Addresses, and why a connection could not be made, in the words of the system."""

from __future__ import annotations

import errno
import socket

import patience
import pytest
import trio

from trio_cluster.net import sockets
from trio_cluster.net.sockets import Sockets, is_refused, local_address, shown_address, why_not_connected

REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
UNREACHABLE = OSError(errno.ENETUNREACH, "Network is unreachable")
TIMED_OUT = TimeoutError(errno.ETIMEDOUT, "Connection timed out")


def caused_by(cause: BaseException) -> OSError:
    """Return what trio raises when no address could be connected to."""
    error = OSError("all attempts to connect to master:9080 failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        pytest.param(trio.TooSlowError(), "it does not answer", id="silence"),
        pytest.param(REFUSED, "Connection refused", id="one error of the system"),
        pytest.param(
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "Name or service not known",
            id="an unknown name",
        ),
        pytest.param(caused_by(REFUSED), "Connection refused", id="one cause"),
        pytest.param(
            caused_by(ExceptionGroup("", [REFUSED, UNREACHABLE, TIMED_OUT])),
            "Connection refused",
            id="the first of several causes",
        ),
        pytest.param(
            caused_by(
                ExceptionGroup(
                    "", [ExceptionGroup("", [ExceptionGroup("", [UNREACHABLE]), REFUSED]), TIMED_OUT]
                )
            ),
            "Network is unreachable",
            id="the first of the innermost group",
        ),
        pytest.param(
            ExceptionGroup("", [ExceptionGroup("", [TIMED_OUT, REFUSED])]),
            "Connection timed out",
            id="groups alone",
        ),
        pytest.param(OSError("no address has been found"), "no address has been found", id="no number"),
        pytest.param(
            caused_by(ValueError("not a host")), "not a host", id="a cause that is not the system's"
        ),
        pytest.param(OSError(), "OSError", id="no words at all"),
        pytest.param(caused_by(KeyError()), "KeyError", id="a cause without words"),
    ],
)
def test_why_there_is_no_connection_is_told_by_its_first_cause(error: Exception, why: str) -> None:
    assert why_not_connected(error) == why


async def test_why_a_port_that_nothing_listens_on_cannot_be_connected_to() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        # Its own type, by which a worker knows that its master is gone.
        with pytest.raises(ConnectionRefusedError) as raised:
            await Sockets().connect(*sock.getsockname())
    assert why_not_connected(raised.value).endswith("Connection refused")


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1:80"), ("name", "name:80"), ("::1", "[::1]:80")]
)
def test_an_ipv6_host_is_shown_in_brackets(host: str, shown: str) -> None:
    assert shown_address(host, 80) == shown


@pytest.mark.parametrize(
    ("host", "local"), [("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1"), ("::", "::1"), ("10.0.0.1", "10.0.0.1")]
)
def test_a_server_on_all_addresses_is_reached_by_the_local_one(host: str, local: str) -> None:
    assert local_address(host) == local


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_machine_that_did_not_answer_is_found_soon_after_it_does(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_PATIENCE", (0.1, 0.15))
    with socket.socket() as listening, socket.socket() as first:
        listening.bind(("127.0.0.1", 0))
        # With a full queue the system answers nothing to further connections.
        listening.listen(0)
        port = listening.getsockname()[1]
        first.connect(("127.0.0.1", port))
        found: list[float] = []

        async def connect() -> None:
            stream = await Sockets().connect(host, port)
            found.append(trio.current_time())
            stream.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            # The system itself would ask again 1 s after it has begun.
            await trio.sleep(0.4)
            assert found == []
            listening.accept()[0].close()
            returned = trio.current_time()
        assert found[0] - returned < 0.5


async def test_a_machine_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_PATIENCE", (0.05, 0.05))
    monkeypatch.setattr(sockets, "_ATTEMPTS", 3)
    with socket.socket() as listening, socket.socket() as first:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        first.connect(listening.getsockname())
        with patience.fail_after(1), pytest.raises(TimeoutError):
            await Sockets().connect("127.0.0.1", listening.getsockname()[1])


async def test_a_connection_that_is_refused_is_told_from_one_that_fails_otherwise() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        # It is bound, so that nobody else has it, and does not listen.
        with pytest.raises(OSError, match="onnect") as refused:
            await Sockets().connect("127.0.0.1", port)
    assert is_refused(refused.value)
    assert is_refused(ConnectionRefusedError(111, "no"))
    assert not is_refused(TimeoutError(110, "no"))
    both = OSError("no")
    both.__cause__ = BaseExceptionGroup("", [ConnectionRefusedError(111, "no"), TimeoutError(110, "no")])
    assert not is_refused(both)
