"""API keys: how they are made, what is kept of them, and the table in which the key of a request is looked up.

A key is ``tc-`` and 256 random bits. Only its SHA-256 digest is kept. A slow hash, as for passwords, would protect
nothing: nobody can try 256 bits. So looking a key up costs one digest and one look into a dict, and never waits.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Iterable
from typing import Final

import attrs

from ..core.principal import BudgetPeriod, Limits, Principal, Priority, Role

__all__ = ["KeyDigest", "KeyEntry", "KeyRecord", "KeyTable", "digest_of", "new_key"]

_PREFIX: Final = "tc-"
_BYTES: Final = 32


def new_key() -> str:
    """Return a new key: visible ASCII characters that need no quotes in a shell."""
    return _PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_BYTES)).rstrip(b"=").decode()


def digest_of(key: bytes) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key).hexdigest()


@attrs.frozen
class KeyDigest:
    """The digest of a key, as :func:`digest_of` makes it."""

    digest: str
    expires_at: float | None = None
    """When this one stops to be valid, in seconds since the epoch: the key was rotated. ``None``: with the key."""


@attrs.frozen(kw_only=True)
class KeyRecord:
    """What the store has about a key."""

    name: str
    models: tuple[str, ...] = ()
    """Patterns (``fnmatch``) of the names of the models that may be used; empty: all models."""
    role: Role = "inference"
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    budget_tokens: int | None = None
    budget_per: BudgetPeriod = "month"
    priority: Priority = "normal"
    weight: float = 1.0
    expires_at: float | None = None
    """When it stops to be valid, in seconds since the epoch; ``None``: never."""
    disabled: bool = False
    created_at: float = 0.0
    """In seconds since the epoch."""

    def principal(self) -> Principal:
        """Return the principal of requests with this key."""
        limits = Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_concurrency=self.max_concurrency,
            budget_tokens=self.budget_tokens,
            budget_per=self.budget_per,
        )
        return Principal(
            name=self.name,
            role=self.role,
            models=self.models,
            limits=None if limits == Limits(budget_per=self.budget_per) else limits,
            weight=self.weight,
            priority=self.priority,
            created_at=self.created_at,
        )


@attrs.frozen
class KeyEntry:
    """A key in the table."""

    digest: bytes = attrs.field(repr=False)
    principal: Principal
    expires_at: float
    """When it stops to be valid, in seconds since the epoch; ``math.inf``: never."""
    disabled: bool


class KeyTable:
    """The keys of a node, in memory. Everything is synchronous.

    Attributes:
        required: requests need a key, since one was made at some time. It stays so when the last one is revoked:
            taking keys away must not open the node to everyone.
    """

    def __init__(self) -> None:
        self.required = False
        self._entries: dict[bytes, KeyEntry] = {}
        self._admin_until = -math.inf

    def replace(self, keys: Iterable[tuple[KeyRecord, Iterable[KeyDigest]]], *, required: bool) -> None:
        """Take over the keys that the store has now."""
        entries: dict[bytes, KeyEntry] = {}
        admin_until = -math.inf
        for record, digests in keys:
            principal = record.principal()
            for digest in digests:
                raw = bytes.fromhex(digest.digest)
                expires_at = min(
                    math.inf if moment is None else moment
                    for moment in (record.expires_at, digest.expires_at)
                )
                entries[raw] = KeyEntry(raw, principal, expires_at, record.disabled)
                if record.role == "admin" and not record.disabled:
                    admin_until = max(admin_until, expires_at)
        self._entries, self._admin_until, self.required = entries, admin_until, required

    def find(self, key: bytes) -> KeyEntry | None:
        """Return the entry of a key, which may be expired or disabled; ``None`` if the key is not known."""
        digest = hashlib.sha256(key).digest()
        entry = self._entries.get(digest)
        # How long the look into the dict takes depends on a digest, of which the client cannot choose a part. It is
        # compared as a whole once more, in constant time.
        return entry if entry is not None and hmac.compare_digest(entry.digest, digest) else None

    @property
    def has_admin(self) -> bool:
        """Whether there is a key of the role ``admin`` that is valid now."""
        return time.time() < self._admin_until
