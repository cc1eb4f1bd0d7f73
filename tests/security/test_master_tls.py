"""The certificates of a master's ports: from files that change, and from the authority."""

from __future__ import annotations

import datetime
import logging
import os
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from memory_streams import memory_pair

from trio_cluster import ClusterServerOptions, OptionsError, ServerOptions
from trio_cluster.core.state_dir import StateDir
from trio_cluster.errors import ClusterError
from trio_cluster.net.tls import TlsStream
from trio_cluster.security.authority import MASTER_NAME, Authority, make_request
from trio_cluster.security.contexts import CertificateError, client_context, unverified_context
from trio_cluster.security.invitations import JoinRefused
from trio_cluster.security.master_tls import MasterTls, TlsSuspended, TlsUnavailable, open_tls

NOW = datetime.datetime.now(datetime.UTC)


async def shown(server: ssl.SSLContext, name: str, client: ssl.SSLContext | None = None) -> str | None:
    """Return the common name of the certificate that a client gets that asks for ``name``; ``None``: it refuses it."""
    near, far = memory_pair()
    stream, other = (
        TlsStream(near, client or unverified_context(), server_name=name),
        TlsStream(far, server),
    )
    certificate: bytes | None = None

    async def serve() -> None:
        try:
            await other.handshake()
        except trio.BrokenResourceError:
            other.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        try:
            await stream.handshake()
        except trio.BrokenResourceError:
            stream.close()
            return None
        certificate = stream._ssl.getpeercert(binary_form=True)
    assert certificate is not None
    return _common_name(certificate)


def _common_name(der: bytes) -> str:
    from cryptography import x509

    (name,) = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(name.value)


def write_certificate(place: Path, authority: Authority, names: Sequence[str]) -> tuple[Path, Path]:
    """Write a certificate and its key, as an operator has them, into two files."""
    content = authority.server_certificate([*names, f"n{os.urandom(4).hex()}"], NOW).read_text()
    split = content.index("-----BEGIN CERTIFICATE")
    certificate, key = place / "cert.pem", place / "key.pem"
    key.write_text(content[:split])
    certificate.write_text(content[split:])
    return certificate, key


def made(state: Path | None, certificate: Path | None = None, key: Path | None = None) -> MasterTls:
    return MasterTls(
        None if state is None else StateDir(state),
        ["127.0.0.1", "gpu.lan"],
        certificate=certificate,
        key=key,
        alpn=["http/1.1"],
    )


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (what threads and files change has no event)
        await trio.sleep(0.01)


async def test_files_that_change_are_read_again_and_bad_ones_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    operator = Authority(StateDir(tmp_path / "operator"), NOW)
    certificate, key = write_certificate(tmp_path, operator, ["gpu.lan"])
    tls = made(None, certificate, key)
    first = tls.api_context()
    trust = client_context(authority=operator.trusted)
    assert await shown(first, "gpu.lan", trust)
    assert await shown(first, "new.lan", trust) is None

    tls._refresh(False)
    assert tls.api_context() is first
    # Only one of the two files is there yet.
    old_key = key.read_text()
    write_certificate(tmp_path, operator, ["gpu.lan", "new.lan"])
    new_key = key.read_text()
    key.write_text(old_key)
    with pytest.raises(CertificateError, match=r"key\.pem: it is not the key of the certificate in"):
        tls._refresh(False)
    assert tls.api_context() is first
    key.write_text(new_key)
    tls._refresh(False)
    assert await shown(tls.api_context(), "new.lan", trust)
    assert "certificates were read again" in caplog.text


async def test_a_change_is_noticed_within_seconds_and_a_failure_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("trio_cluster.security.master_tls._LOOK", 0.01)
    operator = Authority(StateDir(tmp_path / "operator"), NOW)
    certificate, key = write_certificate(tmp_path, operator, ["gpu.lan"])
    tls = made(None, certificate, key)
    first = tls.api_context()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tls.run)
            key.write_text("")
            await until(lambda: "the new certificate is not used" in caplog.text)
            assert tls.api_context() is first
            await trio.sleep(0.1)
            write_certificate(tmp_path, operator, ["gpu.lan"])
            await until(lambda: tls.api_context() is not first)
            nursery.cancel_scope.cancel()
    assert caplog.text.count("there is no certificate and private key in PEM") == 1


async def test_a_clock_that_is_set_back_does_not_put_off_the_look_at_the_age_of_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_cluster.security.master_tls._LOOK", 0.01)
    tls = made(tmp_path / "state")
    first = tls.api_context()
    now = time.time()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tls.run)
            await trio.sleep(0.1)
            assert tls.api_context() is first
            monkeypatch.setattr(time, "time", lambda: now - 365 * 86400)
            await until(lambda: tls.api_context() is not first)
            nursery.cancel_scope.cancel()


async def test_members_are_shown_the_certificate_of_the_authority_and_others_that_of_the_operator(
    tmp_path: Path,
) -> None:
    operator = Authority(StateDir(tmp_path / "operator"), NOW)
    certificate, key = write_certificate(tmp_path, operator, ["gpu.lan"])
    tls = made(tmp_path / "state", certificate, key)
    assert tls.authority is not None
    members = client_context(authority=tls.authority.trusted)
    others = client_context(authority=operator.trusted)
    for context in (tls.api_context(), tls.link_context()):
        assert await shown(context, "gpu.lan", others)
        assert await shown(context, MASTER_NAME, members)
        # Members trust nobody else, and others not the authority.
        assert await shown(context, "gpu.lan", members) is None


async def test_only_the_port_for_workers_asks_for_certificates(tmp_path: Path) -> None:
    tls = made(tmp_path)
    assert tls.api_context().verify_mode is ssl.CERT_NONE
    assert tls.link_context().verify_mode is ssl.CERT_OPTIONAL


async def test_what_was_granted_counts_as_soon_as_it_was_answered(tmp_path: Path) -> None:
    tls = made(tmp_path)
    token = await tls.invite(["gpu.lan:8080"], "w1", 60.0)
    _, request = make_request("w1")
    granted = await tls.join(token.secret, request, "another")
    assert granted.name == "w1"
    with pytest.raises(JoinRefused, match="not signed with the key of the certificate"):
        await tls.renew(granted.certificate, make_request("w1")[1])
    renewed = await tls.renew(granted.certificate, request)
    assert renewed.certificate != granted.certificate
    assert tls.members is not None
    assert tls.authority is not None
    _, serial, _ = tls.authority.key_of_worker(renewed.certificate, NOW)
    assert not tls.is_revoked(serial)
    assert await tls.revoke("w1")
    assert tls.is_revoked(serial)
    # Another process of this machine sees it, too: it is on the disk.
    assert made(tmp_path).is_revoked(serial)
    with pytest.raises(JoinRefused, match="was revoked"):
        await tls.renew(granted.certificate, request)


async def test_what_is_kept_is_changed_by_one_process_at_a_time(tmp_path: Path) -> None:
    old, new = made(tmp_path), made(tmp_path)
    token = await old.invite(["gpu.lan:8080"], "w1", 60.0)
    _, request = make_request("w1")
    with pytest.raises(JoinRefused, match="not known"):
        await new.join(token.secret, request, "w1")
    await old.suspend()
    for change in (
        lambda: old.invite([], "w2", 60.0),
        lambda: old.join(token.secret, request, "w1"),
        lambda: old.revoke("w1"),
        old.rotate,
        # A reload of the configuration, whose failures are of this kind.
        old.read_again,
    ):
        with pytest.raises(ClusterError, match="takes the place of this master") as raised:
            await change()
        assert isinstance(raised.value, TlsSuspended)
    await new.reload()
    granted = await new.join(token.secret, request, "w1")
    with pytest.raises(TlsSuspended):
        await old.renew(granted.certificate, request)
    fingerprint = await new.rotate()
    assert old.authority is not None
    assert old.authority.fingerprint != fingerprint
    old.resume()
    await old.reload()
    assert old.authority.fingerprint == fingerprint
    assert old.is_member("w1")
    assert await old.revoke("w1")


async def test_a_rotation_applies_to_the_next_connection(tmp_path: Path) -> None:
    tls = made(tmp_path)
    assert tls.authority is not None
    old = client_context(authority=tls.authority.trusted)
    fingerprint = await tls.rotate()
    assert fingerprint == tls.authority.fingerprint
    new = client_context(authority=tls.authority.trusted)
    assert await shown(tls.api_context(), MASTER_NAME, new)
    assert await shown(tls.api_context(), MASTER_NAME, old)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tls_key": "key.pem"}, "tls_key: it needs tls_cert"),
        ({"tls_cert": "nowhere.pem"}, "tls_cert nowhere.pem: No such file"),
        ({"tls_cert": "empty.pem"}, "there is no certificate and private key in PEM in it"),
        ({"tls_cert": "cert.pem", "tls_key": "nowhere.pem"}, "tls_key nowhere.pem: No such file"),
        ({"tls_cert": "cert.pem", "tls_key": "locked.pem"}, "the private key has a password"),
        ({"tls": "auto"}, "set state_dir"),
    ],
)
async def test_what_cannot_be_used_is_one_clear_error(
    options: dict[str, str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives import serialization

    monkeypatch.chdir(tmp_path)
    _, key = write_certificate(tmp_path, Authority(StateDir(tmp_path / "operator"), NOW), [])
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    (tmp_path / "locked.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    (tmp_path / "empty.pem").touch()
    node = ClusterServerOptions(server=ServerOptions(**options))  # type: ignore[arg-type]
    with pytest.raises((CertificateError, OptionsError, TlsUnavailable)) as caught:
        await open_tls(node, None, lambda: ["127.0.0.1"])
    assert why in str(caught.value)


async def test_without_the_package_that_makes_certificates_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = Authority(StateDir(tmp_path / "operator"), NOW)
    certificate, key = write_certificate(tmp_path, operator, ["gpu.lan"])
    monkeypatch.setitem(sys.modules, "trio_cluster.security.authority", None)
    with pytest.raises(TlsUnavailable, match="pip install cryptography"):
        made(tmp_path / "state")
    # With a certificate of the operator's, only invitations are missing.
    tls = made(tmp_path / "state", certificate, key)
    with pytest.raises(TlsUnavailable, match="it can invite no workers"):
        await tls.invite(["gpu.lan:8080"], None, 60.0)
