"""Who is admitted as a worker."""

from __future__ import annotations

import attrs
import pytest

from trio_cluster import ClusterServerOptions
from trio_cluster.cluster.admission import Admitted, Doorkeeper
from trio_cluster.link.websocket import Refusal
from trio_cluster.net.streams import PeerCertificate, TlsSession

TLS = TlsSession("TLSv1.3", "http/1.1", None)
MEMBER = TlsSession("TLSv1.3", "http/1.1", PeerCertificate("w1", "a7"))
RIGHT = {"authorization": "Bearer secret"}
WRONG = {"authorization": "Bearer guess"}


@pytest.mark.parametrize(
    ("token", "anonymous", "tls", "headers", "expected"),
    [
        (None, False, None, {}, "open"),
        (None, False, None, RIGHT, "open"),
        (None, True, TLS, {}, "open"),
        (None, False, TLS, {}, 401),
        (None, False, TLS, RIGHT, 401),
        (None, False, MEMBER, {}, "certificate"),
        ("secret", False, None, {}, 401),
        ("secret", False, None, WRONG, 401),
        ("secret", False, None, RIGHT, "token"),
        ("secret", True, TLS, {}, 401),
        ("secret", True, TLS, WRONG, 401),
        ("secret", False, TLS, RIGHT, "token"),
        ("secret", False, MEMBER, {}, "certificate"),
        ("secret", False, MEMBER, WRONG, "certificate"),
    ],
)
def test_a_worker_shows_its_certificate_or_the_token(
    token: str | None,
    anonymous: bool,
    tls: TlsSession | None,
    headers: dict[str, str],
    expected: str | int,
) -> None:
    options = ClusterServerOptions(cluster_token=token, allow_anonymous_workers=anonymous)
    decision = Doorkeeper(options).admit(headers, tls)
    if isinstance(expected, int):
        assert isinstance(decision, Refusal)
        assert decision.status == expected
    else:
        assert isinstance(decision, Admitted)
        assert decision.how == expected
        assert decision.name == ("w1" if expected == "certificate" else None)


def test_a_certificate_that_was_revoked_is_refused_whatever_else_is_shown() -> None:
    options = ClusterServerOptions(cluster_token="secret", allow_anonymous_workers=True)
    decision = Doorkeeper(options, {"a7"}.__contains__).admit(RIGHT, MEMBER)
    assert decision == Refusal(403, "the certificate of the worker 'w1' was revoked")


def test_the_token_is_read_for_each_worker() -> None:
    options = ClusterServerOptions()
    doorkeeper = Doorkeeper(options)
    assert isinstance(doorkeeper.admit({}, None), Admitted)
    options.cluster_token = "secret"
    assert isinstance(doorkeeper.admit({}, None), Refusal)


def test_the_name_of_a_worker_that_was_invited_is_nobody_elses() -> None:
    doorkeeper = Doorkeeper(ClusterServerOptions(), is_member={"w1"}.__contains__)
    assert doorkeeper.why_not(Admitted("certificate", "w1"), "w1") is None
    assert doorkeeper.why_not(Admitted("certificate", "w1"), "w2") == (
        "the certificate is for the worker 'w1', and not for 'w2'"
    )
    for how in ("token", "open"):
        assert doorkeeper.why_not(Admitted(how), "w2") is None  # type: ignore[arg-type]
        assert doorkeeper.why_not(Admitted(how), "w1") == "the name 'w1' belongs to a worker that was invited"  # type: ignore[arg-type]


def test_a_worker_that_shows_nothing_is_told_the_command_that_invites_it() -> None:
    doorkeeper = Doorkeeper(ClusterServerOptions(), invite_command=lambda: "trio-cluster invite https://m:1")
    decision = doorkeeper.admit({}, attrs.evolve(MEMBER, peer=None))
    assert isinstance(decision, Refusal)
    assert "(trio-cluster invite https://m:1)" in decision.reason
