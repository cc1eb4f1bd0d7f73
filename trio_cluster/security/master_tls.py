"""TLS of a master's two ports: which certificate is shown to whom, kept fresh while it runs.

Theory of operation
===================

There are two sources of certificates, and both may be in use at once:

- *Files of the operator* (``tls_cert``, ``tls_key``). They are looked at every :data:`_LOOK` seconds, and read again
  when they have changed, as certbot and cert-manager change them. What cannot be used, such as a certificate whose key
  has not been written yet, is logged once, and the certificate before it stays in use.
- *The cluster's own authority* (``authority.py``), which has a certificate for this master, and renews it in time.

A client that asks for :data:`~trio_cluster.security.authority.MASTER_NAME` is a worker that was invited, or one that
joins: it gets the certificate of the authority. All others get that of the operator, if there is one.

Only the port for workers asks for certificates of clients. On the other one browsers would show a dialogue about it.

*The state directory may pass from one process to another*, when that takes the place of this one. What the authority
keeps there is changed by one of them at a time: this one is suspended first (:meth:`MasterTls.suspend`), and the other
one reads it again then (:meth:`MasterTls.reload`). What was read when it started may be minutes old: an invitation
would be forgotten, and a worker that was revoked since admitted.

A context is made when its files change, and then used by all connections that come in. So accepting a connection reads
no file. What reads or writes files runs in threads, one after the other.
"""

from __future__ import annotations

import datetime
import logging
import os
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

from ..core.state_dir import StateDir, path_of
from ..core.threads import run_in_thread, start_in_thread
from ..errors import ClusterError, OptionsError
from ..options import ClusterServerOptions
from .contexts import server_context
from .invitations import JoinRefused, Members, Token

if TYPE_CHECKING:
    from .authority import Authority

__all__ = ["Granted", "MasterTls", "TlsSuspended", "TlsUnavailable", "open_tls"]

logger = logging.getLogger("trio_cluster.tls")

#: Seconds between two looks at the files.
_LOOK: Final = 2.0
#: Seconds between two looks at the age of the certificate.
_RENEWAL_CHECK: Final = 3600.0

T = TypeVar("T")


class TlsUnavailable(ClusterError):
    """TLS, or the cluster's own authority, cannot be used here; the message says why, and what to do."""


class TlsSuspended(ClusterError):
    """Another process takes the place of this one: it is to be asked."""


@attrs.frozen
class Granted:
    """What a worker is given when it joins, or when its certificate is renewed."""

    name: str
    certificate: str
    """Its certificate, in PEM."""
    authority: str
    """The certificates of the authorities to trust, in PEM."""


class MasterTls:
    """The certificates of one node. Made in a thread: it reads files, and perhaps makes an authority.

    Args:
        state: where the authority is kept; ``None``: there is none.
        names: the names and addresses under which the node is reached.
        certificate, key: files of the operator; ``None``: the authority's certificate is for everybody.
        alpn: the protocols of the API.

    Raises:
        TlsUnavailable: the library that makes certificates is missing.
        CertificateError: the files cannot be used.
        StateDirError: the authority cannot be read or kept.
    """

    def __init__(
        self,
        state: StateDir | None,
        names: Sequence[str],
        *,
        certificate: Path | None,
        key: Path | None,
        alpn: list[str],
    ) -> None:
        self.authority: Authority | None = None
        self.members: Members | None = None
        self._state = state
        self._names = names
        self._certificate = certificate
        self._key = key
        self._alpn = alpn
        self._seen: object = None
        self._complained = ""
        self._suspended = False
        self._one_at_a_time = trio.Lock()
        if state is not None:
            self._open_authority(state)
        self._api, self._link = self._make_contexts()
        self._seen = self._versions()

    def _open_authority(self, state: StateDir) -> None:
        try:
            from .authority import Authority
        except ImportError as error:
            if self._certificate is None:
                raise TlsUnavailable(
                    "tls 'auto' needs the package cryptography: pip install cryptography; or set "
                    "tls_cert and tls_key"
                ) from error
            # With certificates of the operator's, only invitations need it.
            return
        self.authority = Authority(state, _now())
        self.members = Members(state)

    def api_context(self) -> ssl.SSLContext:
        """Return the context of the next connection to the API. Synchronous."""
        return self._api

    def link_context(self) -> ssl.SSLContext:
        """Return the context of the next connection to the port for workers. Synchronous."""
        return self._link

    def is_revoked(self, serial: str) -> bool:
        """Tell whether the certificate of a worker was revoked. Synchronous."""
        return self.members is not None and self.members.is_revoked(serial)

    def is_member(self, name: str) -> bool:
        """Tell whether a worker of this name was invited, and not revoked since. Synchronous."""
        return self.members is not None and self.members.is_member(name)

    async def run(self) -> None:
        """Read certificates again when they change, and renew the own one, until cancelled."""
        checked = time.time()
        while True:
            await trio.sleep(_LOOK)
            # By the clock on the wall, since a machine that was suspended has not counted the time.
            # One that was set back does not put the next look off.
            renew = not self._suspended and not 0 <= time.time() - checked <= _RENEWAL_CHECK
            if not renew and self._certificate is None:
                continue
            if renew:
                checked = time.time()
            try:
                await self._run(self._refresh, renew)
            except Exception as error:
                if str(error) != self._complained:
                    self._complained = str(error)
                    logger.error("the new certificate is not used: %s", error)
            else:
                self._complained = ""

    async def read_again(self) -> Callable[[], bool]:
        """Read the certificates again, and return a function that has them shown from then on. A checkpoint.

        Returns:
            A synchronous function, which returns whether the files of the operator had changed. Until it is called,
            nothing has changed.

        Raises:
            CertificateError: the files cannot be used.
            StateDirError: the authority cannot be read or kept.
        """
        versions, contexts = await self._do(lambda: (self._versions(), self._make_contexts()))

        def show() -> bool:
            changed = versions != self._seen
            (self._api, self._link), self._seen = contexts, versions
            self._complained = ""
            return changed

        return show

    def _refresh(self, renew: bool) -> None:
        versions = self._versions()
        if versions == self._seen and not renew:
            return
        changed = versions != self._seen
        self._api, self._link = self._make_contexts()
        self._seen = versions
        if changed:
            logger.info("certificates were read again")

    def _versions(self) -> object:
        """Return something that changes with the files of the operator."""
        found = []
        for path in (self._certificate, self._key):
            if path is not None:
                try:
                    status = os.stat(path)
                    found.append((status.st_mtime_ns, status.st_size, status.st_ino))
                except OSError:
                    found.append((0, 0, 0))
        return found

    def _make_contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Return the contexts of the API and of the port for workers."""
        own: Path | None = None
        clients: str | None = None
        if self.authority is not None:
            own = self.authority.server_certificate(self._names, _now())
            clients = self.authority.trusted
        shown, key = (self._certificate, self._key) if self._certificate is not None else (own, None)
        assert shown is not None
        api = server_context(shown, key, alpn=self._alpn)
        link = server_context(shown, key, alpn=["http/1.1"], clients=clients, tickets=False)
        if own is not None and self._certificate is not None:
            _show_to_members(api, server_context(own, None, alpn=self._alpn))
            _show_to_members(
                link, server_context(own, None, alpn=["http/1.1"], clients=clients, tickets=False)
            )
        return api, link

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        """Call a function in a thread, when no other one runs; it is not left alone when this is cancelled."""
        async with self._one_at_a_time:
            return await run_in_thread(function, *args)

    async def _do(self, function: Callable[..., T], *args: object) -> T:
        """Call a function that changes what is kept. A checkpoint.

        Raises:
            TlsSuspended: another process keeps it now.
        """

        def do() -> T:
            if self._suspended:
                raise TlsSuspended("another process takes the place of this master; try again")
            return function(*args)

        return await self._run(do)

    # When another process takes over

    async def suspend(self) -> None:
        """Change nothing in the state directory from now on; what is being changed is complete then. A checkpoint."""

        def suspend() -> None:
            self._suspended = True

        await self._run(suspend)

    def resume(self) -> None:
        """The state directory is this process's as before. Synchronous."""
        self._suspended = False

    async def reload(self) -> None:
        """Read what another process has kept in the state directory, which is this process's, too. A checkpoint.

        Raises:
            StateDirError, CertificateError: it cannot be read, or not be used.
        """

        def reload() -> None:
            if self._state is not None:
                self._open_authority(self._state)
            self._api, self._link = self._make_contexts()

        await self._run(reload)

    # For operators and workers

    async def invite(self, addresses: Sequence[str], name: str | None, expires_in: float) -> Token:
        """Make an invitation. A checkpoint.

        Args:
            addresses: where the API is, ``host:port``.
            name: the name of the worker; ``None``: it chooses one.
            expires_in: seconds.

        Raises:
            TlsUnavailable: there is no authority.
            RequestRefused: no worker can have this name.
            JoinRefused: there are too many invitations.
            StateDirError: it cannot be kept.
            TlsSuspended: another process takes over.
        """
        authority, members = self._need_authority()
        if name is not None:
            from .authority import check_worker_name

            check_worker_name(name)
        now = time.time()
        return await self._do(
            lambda: members.invite(
                addresses, authority.fingerprint, name=name, expires=now + expires_in, now=now
            )
        )

    async def join(self, secret: str, request: str, name: str) -> Granted:
        """Give a worker a certificate for the secret of an invitation. A checkpoint.

        Args:
            secret: as in the token.
            request: a request for a certificate, in PEM.
            name: the name that the worker would like to have.

        Raises:
            TlsUnavailable: there is no authority.
            JoinRefused, RequestRefused: it gets none; the message says why.
            StateDirError: it cannot be kept.
            TlsSuspended: another process takes over.
        """
        authority, members = self._need_authority()

        def grant() -> Granted:
            from .authority import requested_key_digest

            members.check_secret(secret)
            key = requested_key_digest(request)
            given = members.check_invitation(secret, key, name, time.time())
            certificate, serial = authority.worker_certificate(request, given, _now())
            members.record(given, key, serial, secret)
            return Granted(given, certificate, authority.trusted)

        return await self._do(grant)

    async def renew(self, certificate: str, request: str) -> Granted:
        """Give a worker a new certificate for the one that it has. A checkpoint.

        The request is signed with the key that the old certificate is for, which proves that it is this worker's.

        Args:
            certificate: the old one, in PEM.
            request: a request for a new one with the same key, in PEM.

        Raises:
            TlsUnavailable, JoinRefused, RequestRefused, StateDirError, TlsSuspended: as :meth:`join`.
        """
        authority, members = self._need_authority()

        def grant() -> Granted:
            from .authority import requested_key_digest

            name, serial, key = authority.key_of_worker(certificate, _now())
            if requested_key_digest(request) != key:
                raise JoinRefused("the request is not signed with the key of the certificate")
            members.check_renewal(name, serial, key)
            renewed, new_serial = authority.worker_certificate(request, name, _now())
            members.record(name, key, new_serial)
            return Granted(name, renewed, authority.trusted)

        return await self._do(grant)

    async def revoke(self, name: str) -> bool:
        """Refuse the certificates of a worker for ever. A checkpoint.

        Returns:
            Whether there was a worker, or an invitation, of this name.

        Raises:
            TlsUnavailable: there is no authority.
            StateDirError: it cannot be kept.
            TlsSuspended: another process takes over.
        """
        _, members = self._need_authority()
        return await self._do(members.revoke, name)

    async def rotate(self) -> str:
        """Replace the authority. The old one is trusted for a while. A checkpoint.

        Returns:
            The fingerprint of the new one.

        Raises:
            TlsUnavailable: there is no authority.
            StateDirError: it cannot be kept.
            TlsSuspended: another process takes over.
        """
        authority, _ = self._need_authority()

        def replace() -> str:
            authority.rotate(_now())
            self._api, self._link = self._make_contexts()
            return authority.fingerprint

        return await self._do(replace)

    def _need_authority(self) -> tuple[Authority, Members]:
        if self.authority is None or self.members is None:
            raise TlsUnavailable(
                "this master has no authority, so it can invite no workers: that needs the package cryptography "
                "(pip install cryptography) and a state_dir"
            )
        return self.authority, self.members


async def open_tls(
    options: ClusterServerOptions, state: StateDir | None, names: Callable[[], Sequence[str]]
) -> MasterTls | None:
    """Return the certificates that the options ask for; ``None`` if they ask for none. A checkpoint.

    Args:
        options: of the node.
        state: where an authority can be kept; ``None``: nowhere.
        names: returns the names and addresses under which the node is reached; called in a thread.

    Raises:
        OptionsError: the options do not fit together.
        TlsUnavailable, CertificateError, StateDirError: there can be no TLS.
    """
    server = options.server
    certificate, key = path_of(server.tls_cert), path_of(server.tls_key)
    if certificate is None:
        if key is not None:
            raise OptionsError("tls_key: it needs tls_cert, the certificate that it is for")
        if not server.has_tls:
            await trio.lowlevel.checkpoint()
            return None
        if state is None:
            raise TlsUnavailable("tls 'auto' needs a directory for the authority: set state_dir")
    alpn = ["h2", "http/1.1"] if server.http == "hypercorn" else ["http/1.1"]

    def make() -> MasterTls:
        return MasterTls(state, names(), certificate=certificate, key=key, alpn=alpn)

    return await start_in_thread(make)


def _show_to_members(context: ssl.SSLContext, own: ssl.SSLContext) -> None:
    """Let a context show the certificate of the cluster's authority to those who ask for it by name."""
    from .authority import MASTER_NAME

    def choose(stream: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name == MASTER_NAME:
            stream.context = own

    context.sni_callback = choose


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
