"""Which workers a master admits: by the certificate that they have shown, by the token, or without either.

Without TLS, a master admits whoever knows the token, and everybody if there is none: that is for one machine, or for a
network of one's own. With TLS a worker has to show one of the two, unless the option ``allow_anonymous_workers`` says
otherwise; the port may then be open to the internet.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

import attrs

from ..core.status import Admission
from ..link.websocket import Refusal
from ..net.streams import TlsSession
from ..options import ClusterServerOptions

__all__ = ["Admitted", "Doorkeeper"]


@attrs.frozen
class Admitted:
    """A worker that may join."""

    how: Admission
    name: str | None = None
    """The name that it must have; ``None``: any."""


def _never(_: str) -> bool:
    return False


def _invite() -> str:
    return "trio-cluster invite"


@attrs.frozen
class Doorkeeper:
    """Decides which workers are admitted."""

    options: ClusterServerOptions
    """Read at the time of use."""
    is_revoked: Callable[[str], bool] = _never
    """Tells whether the certificate with this serial number was revoked."""
    is_member: Callable[[str], bool] = _never
    """Tells whether a worker of this name was invited; nobody else may have its name then."""
    invite_command: Callable[[], str] = _invite
    """Returns the command that makes an invitation, for people on the machine of the master."""

    def admit(self, headers: dict[str, str], tls: TlsSession | None) -> Admitted | Refusal:
        """Decide about a worker that asks to join. Synchronous.

        Args:
            headers: of the opening handshake; names in lower case.
            tls: what its TLS handshake has agreed on; ``None`` without TLS.
        """
        if tls is not None and tls.peer is not None:
            if self.is_revoked(tls.peer.serial):
                return Refusal(403, f"the certificate of the worker '{tls.peer.name}' was revoked")
            return Admitted("certificate", tls.peer.name)
        token = self.options.cluster_token
        if token is not None:
            shown = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(shown, b"Bearer " + token.encode("ascii")):
                return Refusal(401, "wrong or missing cluster token")
            return Admitted("token")
        if tls is not None and not self.options.allow_anonymous_workers:
            return Refusal(
                401,
                f"this master admits workers with an invitation ({self.invite_command()}) or with the cluster token",
            )
        return Admitted("open")

    def why_not(self, admitted: Admitted, name: str) -> str | None:
        """Return why an admitted worker may not have a name; ``None`` if it may. Synchronous."""
        if admitted.name is not None:
            if admitted.name != name:
                return f"the certificate is for the worker '{admitted.name}', and not for '{name}'"
        elif self.is_member(name):
            return f"the name '{name}' belongs to a worker that was invited"
        return None
