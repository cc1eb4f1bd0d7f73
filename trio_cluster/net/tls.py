"""TLS on any :class:`~trio_cluster.net.streams.ByteStream`, without a task and without a thread.

Theory of operation
===================

An ``ssl.SSLObject`` stands between two ``ssl.MemoryBIO``: ciphertext that was read from the connection is put into the
one, and ciphertext that has to be written is taken from the other. So a TLS stream is a ``ByteStream`` like every other
one: what is called for each token encrypts and writes at once, and the fast path stays one. trio's own ``SSLStream``
cannot write without waiting, and costs many times as much for each token.

*Writing.* Ciphertext cannot be taken back. What the connection has not taken of it stays in :attr:`TlsStream._unsent`
and goes out before anything else; the bytes that are in it count as written when its last byte has been taken. Until
then :meth:`TlsStream.try_write` returns 0 for them, and its caller passes them again, which is what the protocol asks
of it.

*Reading may write*: the answer to a key update, or an alert. That is added to the same queue of ciphertext. The reader
does not wait for it: what the connection does not take at once goes out with the next write.

*The end.* A proper end of TLS (``close_notify``), and an end of the connection without one, both read as the end of the
stream. What was cut off shows one layer higher: every message of HTTP and of websockets says where it ends.

*Threads.* The watchdog writes to a link from its own thread while the event loop is blocked (``watchdog.py``). Reading
and writing touch the same ``SSLObject``, so both hold a lock for as long as they compute, and never while they wait.

*The handshake* is done by the task that is going to serve the connection, before it does (``handshakes.py``); a stream
that is read or written before is an error of its caller.
"""

from __future__ import annotations

import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias

import trio

from .addressing import protocol_for
from .sockets import Listeners
from .streams import Address, ByteStream, DirectStream, Listener, PeerCertificate, TlsSession, closed_here

__all__ = [
    "TLS_REQUIRED",
    "MakeContext",
    "TlsHandshakeFailed",
    "TlsListener",
    "TlsStream",
    "connect_tls",
    "why_refused",
    "with_tls",
]

#: Returns the context for the next connection. Synchronous; called for each, so that new certificates apply at once.
MakeContext: TypeAlias = Callable[[], ssl.SSLContext]

#: The answer to a client that speaks HTTP where TLS is expected.
TLS_REQUIRED: Final = "This port speaks TLS: use https:// in the URL"

#: Bytes of ciphertext that are read at a time; a record has up to 16 KiB.
_RECEIVE: Final = 64 * 1024
#: Bytes that are encrypted before they are written.
_ENCRYPT: Final = 64 * 1024
#: What is spoken on every connection to a master, as the name of an application protocol.
_HTTP: Final = "http/1.1"
#: The first byte of every TLS connection: that of a handshake record.
_HANDSHAKE_RECORD: Final = 0x16
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE", "PRI")


class TlsHandshakeFailed(trio.BrokenResourceError):
    """The peers could not agree on a TLS session. The message is one line that says why."""


class TlsStream(DirectStream):
    """TLS on a connection. Before it is used, :meth:`handshake` has to return.

    Args:
        transport: the connection; closed with this stream, and must not be used in any other way.
        context: with the certificates, and what is demanded of the peer.
        server_name: on the side of the client: the name that the server's certificate must be for. ``None``: this is
            the side of the server.
        plain_reply: on the side of the server: returns what to answer to a client that speaks HTTP without TLS.

    """

    needs_handshake = True

    def __init__(
        self,
        transport: ByteStream,
        context: ssl.SSLContext,
        *,
        server_name: str | None = None,
        plain_reply: Callable[[], bytes] | None = None,
    ) -> None:
        super().__init__()
        self.tls = None
        self.descriptor = transport.descriptor
        self.writes_directly = transport.writes_directly
        self.injectable = transport.injectable
        self.virtual_time = transport.virtual_time
        self._transport = transport
        self._plain_reply = plain_reply
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
        )
        self._lock = threading.Lock()
        # Ciphertext that the connection has not taken yet.
        self._unsent = memoryview(b"")
        # Bytes of content that are in it, and have not been counted as written.
        self._uncounted = 0
        # The stream has come to its end.
        self._ended = False
        self._closed = False

    @property
    def pending(self) -> bool:
        """See ``ByteStream``."""
        return bool(self._incoming.pending) or self._ssl.pending() > 0

    @property
    def local_address(self) -> Address:
        """See ``ByteStream``."""
        return self._transport.local_address

    @property
    def peer_address(self) -> Address:
        """See ``ByteStream``."""
        return self._transport.peer_address

    async def handshake(self) -> None:
        """See ``ByteStream``.

        Raises:
            TlsHandshakeFailed: the peer wants something else, or its certificate is not accepted. The stream is to be
                closed.
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        first = True
        while True:
            try:
                with _quiet_about_names():
                    self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                await self._write_outgoing()
            except ssl.SSLError as error:
                # The alert, which tells the peer what is wrong. A new connection takes so little at once.
                self._flush_quietly()
                raise TlsHandshakeFailed(why_refused(error)) from error
            else:
                break
            data = await self._transport.read(_RECEIVE)
            if first and self._ssl.server_side and data:
                await self._refuse_plain(data)
            first = False
            self._feed(data)
        await self._write_outgoing()
        alpn = self._ssl.selected_alpn_protocol()
        peer = _peer_certificate(self._ssl.getpeercert() or {})
        self.needs_handshake = False
        self.tls = TlsSession(self._ssl.version() or "TLS", alpn, peer)

    async def _refuse_plain(self, data: bytes) -> None:
        """Answer a client that does not speak TLS, if it speaks HTTP."""
        if data[0] == _HANDSHAKE_RECORD:
            return
        is_http = data.startswith(tuple(f"{method} ".encode() for method in _METHODS))
        if is_http and self._plain_reply is not None:
            await self._transport.write(self._plain_reply())
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(1):
                # The connection would be reset, and the answer lost, if it were closed with something unread.
                await self._transport.write_eof()
                while await self._transport.read(_RECEIVE):
                    pass
        raise TlsHandshakeFailed("it speaks HTTP without TLS" if is_http else "it does not speak TLS")

    async def _write_outgoing(self) -> None:
        if self._outgoing.pending:
            await self._transport.write(self._outgoing.read())

    # Reading

    async def read(self, limit: int) -> bytes:
        """See ``ByteStream``."""
        if self._closed:
            raise closed_here()
        if self._ended or self.pending:
            await trio.lowlevel.checkpoint_if_cancelled()
            data = self._decrypt(limit)
            await trio.lowlevel.cancel_shielded_checkpoint()
            if data or self._ended:
                return data
        while True:
            ciphertext = await self._transport.read(_RECEIVE)
            # No checkpoint from here on: what was read would be lost.
            self._feed(ciphertext)
            data = self._decrypt(limit)
            if data or self._ended:
                return data

    def read_nowait(self, limit: int) -> bytes:
        """See ``ByteStream``."""
        if self._closed:
            raise closed_here()
        if self.pending and (data := self._decrypt(limit)):
            return data
        while not self._ended:
            self._feed(self._transport.read_nowait(_RECEIVE))
            if data := self._decrypt(limit):
                return data
        return b""

    def _feed(self, ciphertext: bytes) -> None:
        if ciphertext:
            self._incoming.write(ciphertext)
        else:
            self._incoming.write_eof()

    def _decrypt(self, limit: int) -> bytes:
        """Return what has arrived, up to ``limit`` bytes; nothing if there is no whole record, or at the end."""
        pieces: list[bytes] = []
        size = 0
        with self._lock:
            try:
                while size < limit and not self._ended:
                    # A record is at least as long as what is in it. More room than that would be allocated in vain.
                    room = self._incoming.pending + self._ssl.pending()
                    piece = self._ssl.read(min(limit - size, room or 1))
                    if not piece:
                        self._ended = True
                        break
                    pieces.append(piece)
                    size += len(piece)
                    if not (self._incoming.pending or self._ssl.pending()):
                        break
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                self._ended = True
            except ssl.SSLError as error:
                self._flush_quietly()
                if not pieces:
                    raise trio.BrokenResourceError(f"TLS connection broken: {why_refused(error)}") from error
            if self._outgoing.pending:
                self._flush_quietly()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # Writing

    def try_write(self, data: bytes | bytearray | memoryview) -> int:
        """See ``ByteStream``."""
        with self._lock:
            if self._unsent or self._uncounted or self._closed or len(data) > _ENCRYPT:
                return self._write_piecewise(data)
            # From here on it is what happens for every token: one record, which the connection takes at once.
            try:
                self._ssl.write(data)
            except ssl.SSLError as error:
                raise trio.BrokenResourceError(f"TLS connection broken: {why_refused(error)}") from error
            ciphertext = self._outgoing.read()
            written = self._transport.try_write(ciphertext)
            if written == len(ciphertext):
                return len(data)
            self._unsent = memoryview(ciphertext)[written:]
            self._uncounted = len(data)
            return 0

    def _write_piecewise(self, data: bytes | bytearray | memoryview) -> int:
        """Write behind ciphertext that waits, or more than is encrypted at once. The lock must be held."""
        if self._closed:
            raise closed_here()
        if not self._flush():
            return 0
        taken, self._uncounted = min(self._uncounted, len(data)), 0
        while taken < len(data):
            piece = memoryview(data)[taken : taken + _ENCRYPT]
            try:
                self._ssl.write(piece)
            except ssl.SSLError as error:
                raise trio.BrokenResourceError(f"TLS connection broken: {why_refused(error)}") from error
            if not self._flush():
                self._uncounted = len(piece)
                break
            taken += len(piece)
        return taken

    def _flush(self) -> bool:
        """Write ciphertext, as much as the connection takes. Return whether none is left. The lock must be held."""
        if self._outgoing.pending:
            fresh = self._outgoing.read()
            if not self._unsent:
                written = self._transport.try_write(fresh)
                if written == len(fresh):
                    return True
                self._unsent = memoryview(fresh)[written:]
                if not written:
                    return False
            else:
                self._unsent = memoryview(b"".join((self._unsent, fresh)))
        while self._unsent:
            written = self._transport.try_write(self._unsent)
            if not written:
                return False
            self._unsent = self._unsent[written:]
        return True

    def _flush_quietly(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._flush()

    async def wait_writable(self) -> None:
        """See ``ByteStream``."""
        await self._transport.wait_writable()

    async def write_eof(self) -> None:
        """See ``ByteStream``."""
        await trio.lowlevel.checkpoint()
        self._check_writer()
        self._eof_sent = True
        with self._lock:
            self._shut_down()
            complete = self._flush()
        while not complete:
            await self.wait_writable()
            with self._lock:
                complete = self._flush()
        await self._transport.write_eof()

    def _is_closed(self) -> bool:
        return self._closed

    def _shut_down(self) -> None:
        """Put ``close_notify`` behind what was written. The lock must be held."""
        # Shutting down reads, too: what has arrived meanwhile would be an error. OpenSSL has sent its part before.
        with suppress(ssl.SSLError, OSError):
            self._ssl.unwrap()

    def close(self) -> None:
        """See ``ByteStream``."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            # Behind half a record it would be garbage, and so it would be before the end of the handshake.
            if self.tls is not None and not (self._unsent or self._eof_sent):
                self._shut_down()
                self._flush_quietly()
        self._forget()
        self._transport.close()

    def abort(self) -> None:
        """See ``ByteStream``."""
        with self._lock:
            self._closed = True
        self._forget()
        self._transport.abort()

    def _forget(self) -> None:
        if self.descriptor is not None:
            self.descriptor = -1


class TlsListener(Listener):
    """A listener whose connections speak TLS. Their handshakes are left to those who serve them.

    Args:
        listener: where they come in; closed with this one.
        make_context: returns the context of each connection.
        plain_reply: see :class:`TlsStream`.
    """

    def __init__(
        self, listener: Listener, make_context: MakeContext, plain_reply: Callable[[], bytes] | None = None
    ) -> None:
        self.local_address = listener.local_address
        self.shares_descriptors = listener.shares_descriptors
        self._listener = listener
        self._make_context = make_context
        self._plain_reply = plain_reply

    async def accept(self) -> TlsStream:
        """Wait for a connection, and return it. Raises what the listener below raises."""
        return self._wrap(await self._listener.accept())

    def accept_nowait(self) -> TlsStream:
        """See ``Listener``."""
        return self._wrap(self._listener.accept_nowait())

    def _wrap(self, stream: ByteStream) -> TlsStream:
        return TlsStream(stream, self._make_context(), plain_reply=self._plain_reply)

    def limit_unread_time(self, seconds: float) -> None:
        """See ``Listener``."""
        self._listener.limit_unread_time(seconds)

    def close(self) -> None:
        """See ``Listener``."""
        self._listener.close()


def with_tls(
    listeners: Listeners, make_context: MakeContext, plain_reply: Callable[[], bytes] | None = None
) -> list[TlsListener]:
    """Return listeners on which connections speak TLS; see :class:`TlsListener`."""
    return [TlsListener(listener, make_context, plain_reply) for listener in listeners]


async def connect_tls(
    stream: ByteStream, context: ssl.SSLContext, server_name: str, *, process: int | None = None
) -> TlsStream:
    """Return TLS on a connection, as a client that has done its handshake. A checkpoint.

    Args:
        stream: a new connection; closed if this raises an exception, or is cancelled.
        context: says whom to trust, and has the own certificate if there is one.
        server_name: the name or address that the server's certificate must be for.
        process: which process of a master the connection is for; see ``addressing.py``. ``None``: it is not said.

    Raises:
        OSError: the handshake failed, or the connection broke; the message says why.
    """
    if process is not None:
        # The object that is made of the context keeps what is set at this moment.
        context.set_alpn_protocols([protocol_for(process), _HTTP])
    tls = TlsStream(stream, context, server_name=server_name)
    if process is not None:
        context.set_alpn_protocols([_HTTP])
    try:
        await tls.handshake()
    except TlsHandshakeFailed as error:
        tls.close()
        hint = ""
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            hint = "; give its authority with --ca-file, or join with an invitation"
        raise ConnectionError(f"TLS: {error}{hint}") from None
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        tls.close()
        # Without its cause, which people would be shown in its place.
        raise ConnectionError(f"TLS: {str(error) or 'the connection was lost'}") from None
    except BaseException:
        tls.close()
        raise
    return tls


@contextmanager
def _quiet_about_names() -> Iterator[None]:
    """Keep Python from writing a traceback to stderr if a client asks for a name that is not ASCII.

    A context that chooses certificates by name (``sni_callback``) fails for such a client, as it should. Python reports
    that as an exception that cannot be raised, so any client could fill the log. Synchronous.
    """
    hook = sys.unraisablehook

    def report(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, UnicodeDecodeError):
            hook(what)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = hook


#: What OpenSSL's reasons mean, for people. Others are shown as they are.
_REASONS: Final = {
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not trust the authority of this certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer does not accept this certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the peer does not accept this certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this certificate has expired, says the peer",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "this certificate was revoked, says the peer",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer wants a certificate",
    "UNSUPPORTED_PROTOCOL": "the peer speaks only older versions of TLS",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the peer does not speak this version of TLS",
    "NO_SHARED_CIPHER": "there is no cipher that both ends have",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the peer found no way to encrypt that both ends have",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS",
    "CALLBACK_FAILED": "it asks for a name that no server can have",
    "HTTP_REQUEST": "it speaks HTTP without TLS",
    "UNEXPECTED_EOF_WHILE_READING": "the peer has left",
}


def why_refused(error: ssl.SSLError) -> str:
    """Return in a few words what a TLS error means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the peer has left"
    reason = error.reason or ""
    return _REASONS.get(reason) or reason.lower().replace("_", " ") or str(error)


def _peer_certificate(shown: Mapping[str, Any]) -> PeerCertificate | None:
    """Return a certificate, given what ``ssl`` tells of it; of one that was not verified, it tells nothing."""
    if not shown:
        return None
    subject = {name: value for part in shown.get("subject", ()) for name, value in part}
    return PeerCertificate(subject.get("commonName", ""), f"{int(shown['serialNumber'], 16):x}")
