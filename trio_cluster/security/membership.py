"""What a worker that was invited keeps: its key, its certificate, whom it trusts, and where its master is.

Theory of operation
===================

Joining has three steps, and may be killed between any two of them:

1. The worker makes a private key and keeps it, with a digest of the token that it is for (``joining.json``).
2. It sends a request for a certificate with the secret. A master that has answered before answers again, since the key
   is the same.
3. It keeps what it was given (``membership.json``), and forgets the first file.

Starting with the same token again finds the membership, and uses it. OpenSSL reads keys from files only, so the key and
the certificate are written to a file of their own, too (``worker.pem``); that one is made anew when it differs.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any, Final

import attrs

from ..core.state_dir import StateDir
from .authority import RENEW_BEFORE, Authority, certificate_ends, make_request, request_for

__all__ = [
    "Membership",
    "begin_joining",
    "load_membership",
    "neighbour",
    "renewed_neighbour",
    "save_membership",
    "token_digest",
]

_VERSION: Final = 1
_FILE: Final = "membership.json"
_JOINING: Final = "joining.json"
_PEM: Final = "worker.pem"


@attrs.frozen
class Membership:
    """The membership of a worker in a cluster."""

    name: str
    """The name of the worker."""
    addresses: tuple[str, ...]
    """Where the API of the master is, ``host:port``."""
    authority: str
    """The certificates of the authorities that are trusted, in PEM."""
    certificate: str
    """The certificate of the worker, in PEM."""
    key: str = attrs.field(repr=False)
    """Its private key, in PEM."""
    token: str
    """The digest of the token with which it has joined."""

    def needs_renewal(self, now: datetime.datetime) -> bool:
        """Tell whether the certificate ends soon."""
        return now + RENEW_BEFORE > certificate_ends(self.certificate)

    def request(self) -> str:
        """Return a request for a new certificate, for the same key."""
        return request_for(self.key, self.name)


def token_digest(token: str) -> str:
    """Return the digest under which a token is remembered."""
    return hashlib.sha256("".join(token.split()).encode()).hexdigest()


def _read_kept(data: dict[str, Any]) -> Membership:
    """Return the membership that a file has. See ``StateDir.load``."""
    membership = Membership(**data | {"addresses": tuple(data["addresses"])})
    # A certificate that is none is found here.
    certificate_ends(membership.certificate)
    return membership


def load_membership(state: StateDir) -> tuple[Membership, Path] | None:
    """Return the membership that is kept, and the file with the key and the certificate. Blocks.

    Raises:
        StateDirError: it cannot be read, is damaged, or was written by a later version.
    """
    membership = state.load(_FILE, _VERSION, _read_kept, "remove it, and join again")
    if membership is None:
        return None
    pem = (membership.key + membership.certificate).encode()
    if state.read(_PEM) != pem:
        state.write(_PEM, pem)
    return membership, state.path / _PEM


def neighbour(state: StateDir, now: datetime.datetime, name: str | None = None) -> tuple[Membership, Path]:
    """Return a membership for another process of a master's machine, which may read the authority's key. Blocks.

    It is for one run, and not kept: the file with the key and certificate is to be removed when it has been read.

    Args:
        state: the master's.
        now: the time, in UTC.
        name: of the process; ``None``: one is made up.

    Raises:
        StateDirError: the authority cannot be read.
    """
    authority = Authority(state, now)
    name = name or f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
    key, request = make_request(name)
    certificate, _ = authority.worker_certificate(request, name, now)
    file = f".{name}.pem"
    state.write(file, (key + certificate).encode())
    return Membership(name, (), authority.trusted, certificate, key, ""), state.path / file


def renewed_neighbour(
    state: StateDir, now: datetime.datetime, before: Membership
) -> tuple[Membership, Path] | None:
    """Return what :func:`neighbour` would return now, for the same name. Blocks.

    Args:
        state, now: as there.
        before: what it has returned.

    Returns:
        ``None`` if nothing is due: the authority is the same, and the certificate does not end soon.

    Raises:
        StateDirError: the authority cannot be read.
    """
    if Authority(state, now).trusted == before.authority and not before.needs_renewal(now):
        return None
    return neighbour(state, now, before.name)


def save_membership(state: StateDir, membership: Membership) -> None:
    """Keep a membership. Blocks.

    Raises:
        StateDirError: it cannot be written; what was kept before is still there.
    """
    state.save(_FILE, _VERSION, attrs.asdict(membership))
    state.remove(_JOINING)


def begin_joining(state: StateDir, token: str, name: str) -> tuple[str, str]:
    """Return the private key for joining with a token, and a request for a certificate; both in PEM. Blocks.

    The key is kept, so that the next attempt with the same token has the same key.

    Raises:
        StateDirError: it cannot be kept.
    """
    digest = token_digest(token)
    content = state.read(_JOINING)
    if content is not None:
        try:
            kept = json.loads(content)
            if kept["token"] == digest:
                return kept["key"], request_for(kept["key"], name)
        except (ValueError, KeyError, TypeError, AssertionError):
            # Half a key of an older version, or of a damaged disk: nothing was granted for it that is kept.
            pass
    key, request = make_request(name)
    state.save(_JOINING, _VERSION, {"token": digest, "key": key})
    return key, request
