"""TLS on streams: handshakes that succeed and fail, and bytes that come in any pieces.

What a ``ByteStream`` promises is tested on TLS, too, in ``test_streams.py``.
"""

from __future__ import annotations

import logging
import ssl
import sys
from pathlib import Path

import pytest
import trio
from certificates import authority, client_side, now, server_side
from example_counts import examples
from hypothesis import given, settings, strategies as st
from memory_streams import memory_pair
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.state_dir import StateDir
from trio_cluster.net.handshakes import HANDSHAKE_TIMEOUT, MAX_HANDSHAKES, Handshakes
from trio_cluster.net.streams import ByteStream
from trio_cluster.net.throttled_log import BURST
from trio_cluster.net.tls import TlsHandshakeFailed, TlsStream, connect_tls
from trio_cluster.security.authority import MASTER_NAME, Authority
from trio_cluster.security.contexts import client_context, server_context

logger = logging.getLogger("test.handshakes")


def reply() -> bytes:
    return b"HTTP/1.1 400 Bad Request\r\n\r\nuse https"


async def connected(near: ByteStream, far: ByteStream) -> tuple[TlsStream, TlsStream]:
    client = TlsStream(near, client_side(), server_name=MASTER_NAME)
    server = TlsStream(far, server_side())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.handshake)
        nursery.start_soon(server.handshake)
    return client, server


async def why_both_fail(client: TlsStream, server: TlsStream) -> list[str]:
    """Return why the handshake failed, at the client's side and at the server's."""
    found = ["", ""]

    async def attempt(stream: TlsStream, place: int) -> None:
        try:
            await stream.handshake()
            # In TLS 1.3 a client is done before the server has looked at its certificate.
            await stream.read(1)
        except trio.BrokenResourceError as error:
            found[place] = str(error)
        finally:
            stream.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, client, 0)
        nursery.start_soon(attempt, server, 1)
    return found


# Handshakes


async def test_both_ends_know_what_was_agreed_on() -> None:
    client, server = await connected(*memory_pair())
    for stream in (client, server):
        assert stream.tls is not None
        assert (stream.tls.version, stream.tls.alpn) == ("TLSv1.3", "http/1.1")
        assert not stream.needs_handshake
    assert client.tls is not None
    assert client.tls.peer is not None
    assert client.tls.peer.name == MASTER_NAME
    assert server.tls is not None
    assert server.tls.peer is None


async def test_a_certificate_of_a_client_is_known_to_the_server(tmp_path: Path) -> None:
    from trio_cluster.security.authority import make_request

    key, request = make_request("w1")
    certificate, serial = authority().worker_certificate(request, "w1", now())
    file = tmp_path / "w1.pem"
    file.write_text(key + certificate)
    near, far = memory_pair()
    client = TlsStream(
        near, client_context(authority=authority().trusted, certificate=file), server_name=MASTER_NAME
    )
    server = TlsStream(far, server_side())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.handshake)
        nursery.start_soon(server.handshake)
    assert server.tls is not None
    assert server.tls.peer is not None
    assert (server.tls.peer.name, server.tls.peer.serial) == ("w1", serial)


async def test_a_server_with_another_name_is_refused_and_both_ends_know_why() -> None:
    near, far = memory_pair()
    client = TlsStream(near, client_side(), server_name="elsewhere.example")
    theirs, ours = await why_both_fail(client, TlsStream(far, server_side()))
    assert "Hostname mismatch" in theirs
    assert ours == "the peer does not accept this certificate"


async def test_a_server_of_another_authority_is_refused_and_both_ends_know_why(tmp_path: Path) -> None:
    other = Authority(StateDir(tmp_path), now())
    near, far = memory_pair()
    client = TlsStream(near, client_context(authority=other.trusted), server_name=MASTER_NAME)
    theirs, ours = await why_both_fail(client, TlsStream(far, server_side()))
    assert "the certificate is not accepted" in theirs
    assert ours == "the peer does not trust the authority of this certificate"


async def test_a_client_of_another_authority_is_refused(tmp_path: Path) -> None:
    from trio_cluster.security.authority import make_request

    other = Authority(StateDir(tmp_path / "state"), now())
    key, request = make_request("w1")
    file = tmp_path / "w1.pem"
    file.write_text(key + other.worker_certificate(request, "w1", now())[0])
    near, far = memory_pair()
    context = client_context(authority=authority().trusted, certificate=file)
    theirs, ours = await why_both_fail(
        TlsStream(near, context, server_name=MASTER_NAME), TlsStream(far, server_side())
    )
    assert "the certificate is not accepted" in ours
    assert "trust" in theirs


async def test_a_worker_cannot_pass_itself_off_as_a_master(tmp_path: Path) -> None:
    from trio_cluster.security.authority import make_request

    key, request = make_request(MASTER_NAME)
    file = tmp_path / "w1.pem"
    file.write_text(key + authority().worker_certificate(request, MASTER_NAME, now())[0])
    near, far = memory_pair()
    impostor = TlsStream(far, server_context(file, None, alpn=["http/1.1"]))
    theirs, _ = await why_both_fail(TlsStream(near, client_side(), server_name=MASTER_NAME), impostor)
    assert "the certificate is not accepted" in theirs


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n"])
async def test_a_client_that_speaks_http_gets_one_answer_in_http(request_line: bytes) -> None:
    near, far = memory_pair()
    server = TlsStream(far, server_side(), plain_reply=reply)
    received = b""
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            with pytest.raises(TlsHandshakeFailed, match="speaks HTTP without TLS"):
                await server.handshake()
            server.close()

        nursery.start_soon(serve)
        await near.write(request_line + b"\r\n")
        while data := await near.read(1000):
            received += data
            # It leaves when it has the answer.
            near.close() if data == reply() else None
            break
    assert received == reply()


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 100, b"SSH-2.0-OpenSSH_9\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70000]
)
async def test_a_client_that_speaks_something_else_is_refused(garbage: bytes) -> None:
    near, far = memory_pair()
    await near.write(garbage)
    near.close()
    with pytest.raises(trio.BrokenResourceError):
        await TlsStream(far, server_side(), plain_reply=reply).handshake()


async def test_a_client_that_asks_for_a_name_that_is_not_ascii_costs_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    context = server_side()
    context.sni_callback = lambda *_: None
    begin, hello = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side().wrap_bio(begin, hello, server_hostname="gpu.lan")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    near, far = memory_pair()
    await near.write(hello.read().replace(b"gpu.lan", b"\xff" * 7))
    with pytest.raises(TlsHandshakeFailed, match="a name that no server can have"):
        await TlsStream(far, context).handshake()
    assert reported == []
    assert sys.unraisablehook == reported.append


async def test_a_failed_connection_is_an_os_error_that_says_why() -> None:
    near, far = memory_pair()
    far.close()
    with pytest.raises(ConnectionError, match="TLS: the connection was lost"):
        await connect_tls(near, client_side(), MASTER_NAME)


# Limits


async def test_a_handshake_that_takes_too_long_is_given_up(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    handshakes, (_, far) = Handshakes(logger), memory_pair()
    stream = TlsStream(far, server_side())
    began = trio.current_time()
    assert not await handshakes.perform(stream)
    assert trio.current_time() - began == HANDSHAKE_TIMEOUT
    assert "TLS handshake failed: it was not complete within 10 s" in caplog.text
    with pytest.raises(trio.ClosedResourceError):
        await stream.read(1)


async def test_the_oldest_handshake_makes_room_for_a_new_one(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    handshakes = Handshakes(logger)
    ended: list[int] = []

    async def attempt(number: int) -> None:
        _, far = memory_pair()
        assert not await handshakes.perform(TlsStream(far, server_side()))
        ended.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(MAX_HANDSHAKES + 2):
            nursery.start_soon(attempt, number)
            await wait_all_tasks_blocked()
        assert ended == [0, 1]
        assert f"more than {MAX_HANDSHAKES} were begun" in caplog.text
        nursery.cancel_scope.cancel()


async def test_handshakes_that_fail_cost_a_few_lines_a_second(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    handshakes = Handshakes(logger)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handshakes.run)
        for _ in range(100):
            near, far = memory_pair()
            near.close()
            await handshakes.perform(TlsStream(far, server_side()))
        assert len(caplog.records) == BURST
        await trio.sleep(2)
        assert f"{100 - BURST} more TLS handshakes failed" in caplog.text
        nursery.cancel_scope.cancel()


async def test_a_cancelled_handshake_closes_its_connection() -> None:
    handshakes, (near, far) = Handshakes(logger), memory_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handshakes.perform, TlsStream(far, server_side()))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert await near.read(1) == b""


# Bytes


@settings(deadline=None, max_examples=examples(10))
@given(data=st.data())
def test_bytes_arrive_in_order_whatever_pieces_the_connection_takes(data: st.DataObject) -> None:
    trio.run(send_in_pieces, data)


async def send_in_pieces(data: st.DataObject) -> None:
    near, far = memory_pair()
    client, server = await connected(near, far)
    sizes = data.draw(st.lists(st.integers(1, 200_000), max_size=6), label="sizes")
    content = [bytes([number]) * size for number, size in enumerate(sizes)]
    sent = b"".join(content)
    received = bytearray()
    for piece in content:
        rest = memoryview(piece)
        while rest:
            near.at_once = data.draw(st.sampled_from([0, 1, 7, 100, 16_384, 1 << 30]), label="at once")
            near.held = near.at_once == 0
            taken = client.try_write(rest)
            assert 0 <= taken <= len(rest)
            rest = rest[taken:]
            limit = data.draw(st.sampled_from([1, 100, 20_000, 1 << 20]), label="limit")
            while True:
                try:
                    part = server.read_nowait(limit)
                except trio.WouldBlock:
                    break
                assert 0 < len(part) <= limit
                received += part
    near.held, near.at_once = False, 1 << 30
    await client.write_eof()
    while part := await server.read(1 << 20):
        received += part
    assert received == sent
    # What was counted as written has arrived; nothing came twice.
    assert not server.pending


async def test_what_was_read_ahead_is_pending() -> None:
    client, server = await connected(*memory_pair())
    await client.write(b"0123456789")
    assert await server.read(4) == b"0123"
    assert server.pending
    assert server.read_nowait(4) == b"4567"
    assert server.pending
    assert await server.read(100) == b"89"
    assert not server.pending
    with pytest.raises(trio.WouldBlock):
        server.read_nowait(1)


async def test_a_connection_that_is_cut_reads_as_its_end() -> None:
    near, far = memory_pair()
    _, server = await connected(near, far)
    near.close()
    assert await server.read(100) == b""
    assert await server.read(100) == b""
    assert server.read_nowait(100) == b""


async def test_what_was_changed_on_the_way_breaks_the_connection() -> None:
    near, far = memory_pair()
    client, server = await connected(near, far)
    record = bytearray()
    near.try_write = lambda data: record.extend(data) or len(data)  # type: ignore[method-assign, func-returns-value, return-value]
    client.try_write(b"hello")
    record[-1] ^= 1
    del near.try_write  # type: ignore[method-assign]
    near.try_write(record)
    with pytest.raises(trio.BrokenResourceError, match="TLS connection broken"):
        await server.read(100)


async def test_versions_before_1_2_are_refused() -> None:
    near, far = memory_pair()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    client = TlsStream(near, old, server_name=MASTER_NAME)
    theirs, ours = await why_both_fail(client, TlsStream(far, server_side()))
    assert "version" in theirs or "versions" in theirs
    assert "versions" in ours or "version" in ours


async def test_1_2_is_spoken_too_and_cannot_be_renegotiated() -> None:
    near, far = memory_pair()
    older = client_context(authority=authority().trusted)
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    client, server = TlsStream(near, older, server_name=MASTER_NAME), TlsStream(far, server_side())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.handshake)
        nursery.start_soon(server.handshake)
    await client.write(b"x" * 100_000)
    received = 0
    while received < 100_000:
        received += len(await server.read(1 << 20))
    assert server_side().options & ssl.OP_NO_RENEGOTIATION
