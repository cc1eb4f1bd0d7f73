"""Invitations of workers, their certificates, and what was revoked, as a master keeps them.

Theory of operation
===================

An invitation is a *token*: one line of text that carries where the master is, the fingerprint of the cluster's
authority, and a secret of 256 bits. The worker makes sure by the fingerprint that it speaks to this cluster before it
sends the secret, and it sends it inside TLS. The master keeps only a digest of it.

*A token works once.* It is bound to the public key of the first worker that uses it. The same worker may ask again with
the same key, for instance because it was killed before it had kept the answer, and gets a certificate again, for the
same name; anybody else is told that the token was used. When the worker is revoked, so is the token.

Everything is in one file, ``members.json``, that is replaced as a whole before anything is answered.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import Any, Final

import attrs

from ..core.state_dir import StateDir
from ..errors import ClusterError

__all__ = [
    "MAX_CERTIFICATES",
    "MAX_INVITATIONS",
    "Invitation",
    "JoinRefused",
    "Members",
    "Token",
    "TokenError",
]

_PREFIX: Final = "tcj-"
_NOT_KNOWN: Final = "this invitation is not known to this master"
_VERSION: Final = 1
_FILE: Final = "members.json"
#: Seconds for which an invitation that is over is remembered, to be able to say why it is refused.
_REMEMBERED: Final = 30 * 86400.0
#: Invitations that are kept at most, those included that are over.
MAX_INVITATIONS: Final = 10_000
#: Certificates of one worker. All of them are kept, so that all can be revoked; one every 60 days is what is needed.
MAX_CERTIFICATES: Final = 1000


class TokenError(ClusterError, ValueError):
    """A text is no token; the message says what is wrong with it."""


class JoinRefused(Exception):
    """A worker may not join; the message says why.

    Args:
        message: the message.
        needs_invitation: a new invitation would help.
    """

    def __init__(self, message: str, *, needs_invitation: bool = False) -> None:
        super().__init__(message)
        self.needs_invitation = needs_invitation


@attrs.frozen
class Token:
    """What a worker has to know to join."""

    addresses: tuple[str, ...]
    """Where the API of the master is, ``host:port``; to be tried in this order."""
    authority: str
    """The fingerprint of the cluster's authority: SHA-256, in hexadecimal digits."""
    secret: str = attrs.field(repr=False)
    """What the worker has to show, once."""

    def encode(self) -> str:
        """Return the token as one word."""
        content = json.dumps(
            [list(self.addresses), self.authority, self.secret], separators=(",", ":")
        ).encode()
        check = hashlib.sha256(content).digest()[:4]
        return _PREFIX + base64.urlsafe_b64encode(check + content).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Token:
        """Return the token that a word is.

        Raises:
            TokenError: it is none, or only a part of one.
        """
        text = "".join(text.split())
        if not text.startswith(_PREFIX):
            raise TokenError(f"this is no invitation; one begins with {_PREFIX}")
        word = text.removeprefix(_PREFIX)
        try:
            data = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
            check, content = data[:4], data[4:]
            if hashlib.sha256(content).digest()[:4] != check:
                raise ValueError
            addresses, authority, secret = json.loads(content)
            if not isinstance(addresses, list) or not all(
                isinstance(each, str) for each in (*addresses, authority, secret)
            ):
                raise ValueError
        except (ValueError, binascii.Error) as error:
            raise TokenError("the invitation is not complete; copy the whole line") from error
        return cls(tuple(addresses), authority, secret)


@attrs.define
class Invitation:
    """An invitation, as the master keeps it. Times are Unix times."""

    name: str | None
    """The name that the worker has or will have; ``None``: the worker says, when it joins."""
    expires: float
    used_by: str | None = None
    """The digest of the public key of the worker that has used it."""
    revoked: bool = False


@attrs.define
class _Member:
    """A worker that was invited."""

    key: str
    """The digest of its public key."""
    serials: list[str] = attrs.Factory(list)
    """The serial numbers of its certificates."""
    revoked: bool = False


def _read_kept(data: dict[str, Any]) -> tuple[dict[str, Invitation], dict[str, _Member], set[str]]:
    """Return the invitations, the members and what was revoked. See ``StateDir.load``."""
    return (
        {digest: Invitation(**each) for digest, each in data["invitations"].items()},
        {name: _Member(**each) for name, each in data["members"].items()},
        set(data["revoked"]),
    )


class Members:
    """The invitations and certificates of a cluster. All methods block, since they write a file.

    Args:
        state: where they are kept.

    Raises:
        StateDirError: the file cannot be read, is damaged, or was written by a later version.
    """

    def __init__(self, state: StateDir) -> None:
        self._state = state
        kept = state.load(_FILE, _VERSION, _read_kept, "restore it from a backup")
        self._invitations, self._members, self._revoked = kept or ({}, {}, set())

    def _save(self) -> None:
        data = {
            "invitations": {digest: attrs.asdict(each) for digest, each in self._invitations.items()},
            "members": {name: attrs.asdict(each) for name, each in self._members.items()},
            "revoked": sorted(self._revoked),
        }
        self._state.save(_FILE, _VERSION, data)

    def invite(
        self, addresses: Sequence[str], authority: str, *, name: str | None, expires: float, now: float
    ) -> Token:
        """Make an invitation.

        Args:
            addresses: where the API is.
            authority: the fingerprint of the authority.
            name: the name that the worker will have, if the worker is not to choose it.
            expires: when it ends, a Unix time.
            now: the time.

        Raises:
            JoinRefused: there are too many invitations.
        """
        self._forget_old(now)
        if len(self._invitations) >= MAX_INVITATIONS:
            raise JoinRefused(f"there are {MAX_INVITATIONS} invitations already")
        token = Token(tuple(addresses), authority, secrets.token_urlsafe(32))
        self._invitations[_digest(token.secret)] = Invitation(name, expires)
        self._save()
        return token

    def _forget_old(self, now: float) -> None:
        for digest, invitation in list(self._invitations.items()):
            if invitation.expires + _REMEMBERED < now:
                del self._invitations[digest]

    def check_secret(self, secret: str) -> None:
        """Refuse what nobody was invited with, before anything is computed for it.

        Raises:
            JoinRefused: there is no such invitation.
        """
        if _digest(secret) not in self._invitations:
            raise JoinRefused(_NOT_KNOWN, needs_invitation=True)

    def check_invitation(self, secret: str, key: str, wanted_name: str, now: float) -> str:
        """Check whether a worker that shows the secret of an invitation may join.

        Args:
            secret: what it shows.
            key: the digest of its public key.
            wanted_name: the name that it would like to have.
            now: the time.

        Returns:
            The name of the worker. Its certificate is to be recorded with :meth:`record`.

        Raises:
            JoinRefused: the invitation is not known, was used, has expired or was revoked; or the name is taken.
        """
        invitation = self._invitations.get(_digest(secret))
        if invitation is None:
            raise JoinRefused(_NOT_KNOWN, needs_invitation=True)
        if invitation.revoked:
            raise JoinRefused("this invitation was revoked", needs_invitation=True)
        if invitation.used_by is not None and invitation.used_by != key:
            raise JoinRefused("this invitation was used already", needs_invitation=True)
        if invitation.used_by is None and invitation.expires <= now:
            raise JoinRefused("this invitation has expired", needs_invitation=True)
        name = invitation.name or wanted_name
        member = self._members.get(name)
        if member is not None and not member.revoked and member.key != key:
            raise JoinRefused(
                f"there is a worker '{name}' already; revoke it first, or choose another name with --name"
            )
        if member is not None and member.revoked and member.key == key:
            raise JoinRefused(f"the worker '{name}' was revoked")
        return name

    def record(self, name: str, key: str, serial: str, secret: str | None = None) -> None:
        """Keep a certificate that was made for a worker, before the worker gets it.

        Args:
            name: the name of the worker.
            key: the digest of its public key.
            serial: the serial number of the certificate.
            secret: of the invitation that was used; ``None``: the certificate was renewed.

        Raises:
            JoinRefused: the worker has had too many.
        """
        member = self._members.get(name)
        if member is None or member.key != key:
            member = self._members[name] = _Member(key)
        if len(member.serials) >= MAX_CERTIFICATES:
            raise JoinRefused(f"the worker '{name}' has had {MAX_CERTIFICATES} certificates; invite it anew")
        member.serials.append(serial)
        if secret is not None:
            invitation = self._invitations[_digest(secret)]
            # The name, too: with another one, the worker would get certificates that nobody knows to revoke.
            invitation.used_by, invitation.name = key, name
        self._save()

    def check_renewal(self, name: str, serial: str, key: str) -> None:
        """Check whether a worker may have a new certificate for the one that it has.

        Raises:
            JoinRefused: it may not.
        """
        member = self._members.get(name)
        if self.is_revoked(serial) or (member is not None and member.revoked):
            raise JoinRefused(f"the certificate of the worker '{name}' was revoked")
        # A file that was restored from a backup may not know it; the certificate itself is valid.
        if member is not None and member.key != key:
            raise JoinRefused(f"the worker '{name}' has another key")

    def is_member(self, name: str) -> bool:
        """Tell whether a worker of this name has joined, and was not revoked."""
        member = self._members.get(name)
        return member is not None and not member.revoked

    def is_revoked(self, serial: str) -> bool:
        """Tell whether a certificate was revoked."""
        return serial in self._revoked

    def revoke(self, name: str) -> bool:
        """Refuse the certificates of a worker, and the invitations for it, for ever.

        Returns:
            Whether there was a worker, or an invitation, of this name.
        """
        found = False
        member = self._members.get(name)
        if member is not None:
            found = True
            member.revoked = True
            self._revoked.update(member.serials)
        for invitation in self._invitations.values():
            # Those that were used as well: they would give the worker a new certificate.
            if invitation.name == name:
                found = invitation.revoked = True
        if found:
            self._save()
        return found


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
