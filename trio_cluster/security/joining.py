"""A worker's requests to its master about certificates: to join, and to renew. They block, and are made in a thread.

The master is told apart from all others by its authority, which the invitation names by its fingerprint: first the
certificate of the authority is fetched from whoever answers, without sending anything, and compared with that; then a
new connection trusts nothing else.
"""

from __future__ import annotations

import datetime
import http.client
import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from ..core.addresses import split_address
from ..core.join_paths import CA_PATH, JOIN_PATH, RENEW_PATH
from ..core.state_dir import StateDir
from ..errors import ClusterError
from .authority import MASTER_NAME, fingerprint
from .contexts import client_context, unverified_context
from .invitations import Token
from .membership import Membership, begin_joining, load_membership, save_membership, token_digest

__all__ = ["JoinFailed", "join", "renew_if_due"]

#: Seconds that each step of a request may take.
_TIMEOUT: Final = 10.0
_MAX_ANSWER: Final = 1 << 20

T = TypeVar("T")


class JoinFailed(ClusterError):
    """The worker could not join, or could not renew its certificate. The message says why.

    Attributes:
        refused: the master has refused it, so that another attempt would fail as well.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def join(state: StateDir, text: str, name: str) -> tuple[Membership, Path]:
    """Join a cluster, or return the membership that this worker has by the same token.

    Args:
        state: where the membership is kept.
        text: the token of an invitation.
        name: the name that the worker would like to have, if the invitation does not say.

    Returns:
        The membership, and the file with its key and certificate.

    Raises:
        TokenError: the text is no token.
        JoinFailed: no master could be reached, or it has refused the worker.
        StateDirError: the membership cannot be kept.
    """
    token = Token.decode(text)
    kept = load_membership(state)
    if kept is not None and kept[0].token == token_digest(text):
        return kept
    key, request = begin_joining(state, text, name)

    def ask(address: str) -> Membership:
        authority = _authority_of(address, token)
        context = client_context(authority=authority)
        body = {"secret": token.secret, "request": request, "name": name}
        answer = _request(address, context, "POST", JOIN_PATH, body)
        return _membership(answer, token.addresses, key, token_digest(text))

    membership = _first_that_answers(token.addresses, ask)
    save_membership(state, membership)
    kept = load_membership(state)
    assert kept is not None
    return kept


def renew_if_due(state: StateDir, membership: Membership) -> Membership:
    """Renew the certificate of a worker if it ends soon, or if the authority was replaced.

    Returns:
        The membership from now on; the same if nothing was due.

    Raises:
        JoinFailed: no master could be reached, or it has refused.
        StateDirError: the membership cannot be kept.
    """
    context = client_context(authority=membership.authority)

    def ask(address: str) -> Membership:
        trusted = _fetch(address, context, CA_PATH).decode("ascii", "replace")
        if trusted == membership.authority and not membership.needs_renewal(
            datetime.datetime.now(datetime.UTC)
        ):
            return membership
        body = {"certificate": membership.certificate, "request": membership.request()}
        answer = _request(address, context, "POST", RENEW_PATH, body)
        return _membership(answer, membership.addresses, membership.key, membership.token)

    renewed = _first_that_answers(membership.addresses, ask)
    if renewed != membership:
        save_membership(state, renewed)
        load_membership(state)
    return renewed


def _first_that_answers(addresses: tuple[str, ...], ask: Callable[[str], T]) -> T:
    failures = []
    for address in addresses:
        try:
            return ask(address)
        except JoinFailed as error:
            if error.refused:
                raise
            failures.append(str(error))
    raise JoinFailed("; ".join(failures) or "the invitation has no address")


def _authority_of(address: str, token: Token) -> str:
    """Return the certificate of the authority with the fingerprint of the token."""
    # Nothing is sent on this connection, and what is received is checked by its fingerprint.
    text = _fetch(address, unverified_context(), CA_PATH).decode("ascii", "replace")
    end = "-----END CERTIFICATE-----\n"
    for certificate in (part + end for part in text.split(end) if part.strip()):
        try:
            if fingerprint(certificate) == token.authority:
                return certificate
        except ValueError:
            break
    raise JoinFailed(
        f"{address}: this is not the cluster that the invitation is for (its authority is another one)",
        refused=True,
    )


def _membership(answer: dict[str, Any], addresses: tuple[str, ...], key: str, token: str) -> Membership:
    try:
        return Membership(
            name=str(answer["name"]),
            addresses=addresses,
            authority=str(answer["authority"]),
            certificate=str(answer["certificate"]),
            key=key,
            token=token,
        )
    except KeyError as error:
        raise JoinFailed(f"the master's answer has no {error}") from error


def _request(
    address: str, context: ssl.SSLContext, method: str, path: str, body: dict[str, Any]
) -> dict[str, Any]:
    return _decode(_exchange(address, context, method, path, json.dumps(body).encode()))


def _fetch(address: str, context: ssl.SSLContext, path: str) -> bytes:
    return _exchange(address, context, "GET", path, None)


def _exchange(address: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None) -> bytes:
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise JoinFailed(f"the invitation: {error}") from None
    headers = {"Host": address, "Connection": "close", "Content-Type": "application/json"}
    try:
        with (
            socket.create_connection((host, port), _TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=MASTER_NAME) as sock,
        ):
            connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
            # It does not connect by itself then: the name that is asked for is not the address.
            connection.sock = sock
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read(_MAX_ANSWER)
    except ssl.SSLCertVerificationError as error:
        raise JoinFailed(f"{address}: its certificate is not accepted: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise JoinFailed(f"{address}: no TLS there ({error.reason or error})") from error
    except (OSError, http.client.HTTPException) as error:
        raise JoinFailed(f"{address}: {getattr(error, 'strerror', None) or error}") from error
    if response.status != http.HTTPStatus.OK:
        details = _decode(content).get("error")
        message = details.get("message") if isinstance(details, dict) else None
        refused = response.status in (400, 403, 409, 410)
        raise JoinFailed(f"{address}: {message or f'HTTP status {response.status}'}", refused=refused)
    return content


def _decode(content: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(content)
    except ValueError:
        return {}
    return decoded if isinstance(decoded, dict) else {}
