"""The audit log: who has done what as an operator or an admin, and from where.

Every action is a line in the node's log at once, whether the node has a database or not. Where it has one, the entry is
also queued, and written with the next batch of the usage journal; see ``journal.py``. Changes of keys are written in
the same transaction as the change itself, so that there is no change without its entry.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import attrs

from ..core import randomness
from ..core.principal import Principal

__all__ = ["AuditEntry", "AuditLog"]

logger = logging.getLogger("trio_cluster.audit")

#: Entries that wait for the database, at most; beyond that, the oldest are only in the node's log.
_MAX_WAITING: Final = 10_000


@attrs.frozen(kw_only=True)
class AuditEntry:
    """One action."""

    action: str
    """What was done, such as ``key.create`` or ``worker.drain``."""
    target: str
    """What it was done to: the name of a key or a worker, or the id of a request."""
    principal: str
    """The name of the key; empty for a client on the same machine that needed none."""
    address: str
    """Where the request came from."""
    details: Mapping[str, Any] = attrs.field(factory=dict)
    time: float = attrs.field(factory=time.time)
    """In seconds since the epoch."""
    entry: str = attrs.field(factory=lambda: randomness.token(16))
    """An id that no other entry has."""


class AuditLog:
    """Records actions. Everything is synchronous.

    Attributes:
        waiting: the entries that the database does not have yet, oldest first; ``None``: there is no database.
    """

    def __init__(self) -> None:
        self.waiting: deque[AuditEntry] | None = None

    def keep(self) -> None:
        """Queue entries for the database from now on."""
        if self.waiting is None:
            self.waiting = deque(maxlen=_MAX_WAITING)

    def keep_no_longer(self) -> None:
        """Only write entries to the node's log from now on."""
        self.waiting = None

    def record(
        self, principal: Principal, address: str, action: str, target: str, **details: Any
    ) -> AuditEntry:
        """Log an action, and queue it for the database.

        Args:
            principal: who has done it.
            address: from where.
            action: what, as two words with a dot between them: ``worker.drain``.
            target: to what.
            details: values that JSON has; never a secret.
        """
        entry = AuditEntry(
            action=action, target=target, principal=principal.name, address=address, details=details
        )
        self.log(entry)
        if self.waiting is not None:
            self.waiting.append(entry)
        return entry

    def log(self, entry: AuditEntry) -> None:
        """Write an entry to the node's log, and nowhere else."""
        fields = {
            "principal": entry.principal or "none",
            "client": entry.address,
            "target": entry.target,
            **entry.details,
        }
        if entry.action.startswith("request."):
            # Not that of the request with which it was asked for.
            fields["request_id"] = entry.target
        logger.info("audit: %s", entry.action, extra={"fields": fields})
