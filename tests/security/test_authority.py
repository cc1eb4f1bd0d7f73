"""The cluster's authority: what it signs, for how long, and what its replacement changes."""

from __future__ import annotations

import base64
import datetime
import json
import ssl
from pathlib import Path

import pytest
import trio
from cryptography import x509
from memory_streams import memory_pair

from trio_cluster.core.state_dir import StateDir, StateDirError
from trio_cluster.net.tls import TlsStream
from trio_cluster.security.authority import (
    GRACE,
    MASTER_NAME,
    RENEW_BEFORE,
    Authority,
    RequestRefused,
    certificate_ends,
    fingerprint,
    make_request,
    request_for,
    requested_key_digest,
)
from trio_cluster.security.contexts import client_context, server_context

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


async def accepts(server: ssl.SSLContext, client: ssl.SSLContext) -> bool:
    """Tell whether both ends accept each other."""
    near, far = memory_pair()
    results: list[bool] = []

    async def attempt(stream: TlsStream) -> None:
        try:
            await stream.handshake()
            await stream.write_eof()
            await stream.read(1)
            results.append(True)
        except trio.BrokenResourceError:
            results.append(False)
        finally:
            stream.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, TlsStream(near, client, server_name=MASTER_NAME))
        nursery.start_soon(attempt, TlsStream(far, server))
    return all(results)


def member(place: Path, authority: Authority, name: str = "w1") -> Path:
    key, request = make_request(name)
    path = place / f"{name}.pem"
    path.write_text(key + authority.worker_certificate(request, name, NOW)[0])
    return path


def test_an_authority_is_the_same_after_a_restart_and_its_files_are_private(tmp_path: Path) -> None:
    first = Authority(StateDir(tmp_path / "state"), NOW)
    first.server_certificate(["gpu.lan"], NOW)
    second = Authority(StateDir(tmp_path / "state"), NOW)
    assert second.fingerprint == first.fingerprint
    assert (tmp_path / "state" / "ca.pem").read_text() == first.trusted
    assert fingerprint(first.trusted) == first.fingerprint
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()} == {0o600}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_a_certificate_of_a_master_is_for_its_names_and_for_servers_only(tmp_path: Path) -> None:
    authority = Authority(StateDir(tmp_path), NOW)
    path = authority.server_certificate(["gpu.lan", "10.0.0.7", "::1"], NOW)
    certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"gpu.lan", MASTER_NAME}
    assert {str(each) for each in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.7", "::1"}
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificate.not_valid_before_utc <= NOW - DAY


def test_a_certificate_of_a_master_is_kept_until_it_is_old_or_lacks_a_name(tmp_path: Path) -> None:
    authority = Authority(StateDir(tmp_path), NOW)
    path = authority.server_certificate(["gpu.lan"], NOW)
    first = path.read_text()
    ends = certificate_ends(first[first.index("-----BEGIN CERT") :])
    authority.server_certificate(["gpu.lan"], ends - RENEW_BEFORE - DAY)
    assert path.read_text() == first
    authority.server_certificate(["gpu.lan", "other.lan"], NOW)
    assert (second := path.read_text()) != first
    authority.server_certificate(["gpu.lan"], ends - RENEW_BEFORE + DAY)
    assert path.read_text() != second


def test_a_certificate_that_was_made_while_the_clock_was_ahead_is_made_again(tmp_path: Path) -> None:
    authority = Authority(StateDir(tmp_path), NOW)
    path = authority.server_certificate([], NOW + 365 * DAY)
    authority.server_certificate([], NOW)
    certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    assert certificate.not_valid_before_utc <= NOW


async def test_master_and_worker_accept_each_other(tmp_path: Path) -> None:
    authority = Authority(StateDir(tmp_path), NOW)
    server = server_context(
        authority.server_certificate([], NOW), None, alpn=["http/1.1"], clients=authority.trusted
    )
    worker = client_context(authority=authority.trusted, certificate=member(tmp_path, authority))
    assert await accepts(server, worker)


async def test_both_authorities_are_trusted_for_a_while_after_a_rotation(tmp_path: Path) -> None:
    authority = Authority(StateDir(tmp_path), NOW)
    old_trusted, old_member = authority.trusted, member(tmp_path, authority, "old")
    authority.rotate(NOW)
    assert authority.trusted.count("BEGIN CERTIFICATE") == 2
    again = Authority(StateDir(tmp_path), NOW)
    assert (again.fingerprint, again.trusted) == (authority.fingerprint, authority.trusted)
    server = server_context(again.server_certificate([], NOW), None, alpn=["http/1.1"], clients=again.trusted)
    new_member = member(tmp_path, again, "new")
    # The new master is accepted by one that knows the old authority only, and accepts it.
    assert await accepts(server, client_context(authority=old_trusted, certificate=old_member))
    assert await accepts(server, client_context(authority=again.trusted, certificate=new_member))
    # An old master would accept only the old one.
    later = Authority(StateDir(tmp_path), NOW + GRACE + DAY)
    assert later.trusted.count("BEGIN CERTIFICATE") == 1
    strict = server_context(later.server_certificate([], NOW), None, alpn=["http/1.1"], clients=later.trusted)
    assert not await accepts(strict, client_context(authority=again.trusted, certificate=old_member))


def test_a_workers_certificate_is_recognized_and_no_other_is(tmp_path: Path) -> None:
    authority = Authority(StateDir(tmp_path / "own"), NOW)
    other = Authority(StateDir(tmp_path / "other"), NOW)
    _, request = make_request("w1")
    certificate, serial = authority.worker_certificate(request, "w1", NOW)
    assert authority.key_of_worker(certificate, NOW) == ("w1", serial, requested_key_digest(request))
    authority.rotate(NOW)
    assert authority.key_of_worker(certificate, NOW)[0] == "w1"
    with pytest.raises(RequestRefused, match="authority of this cluster"):
        authority.key_of_worker(other.worker_certificate(request, "w1", NOW)[0], NOW)
    with pytest.raises(RequestRefused, match="has expired"):
        authority.key_of_worker(certificate, certificate_ends(certificate) + DAY)
    for text in ("", "nonsense", authority.trusted):
        with pytest.raises(RequestRefused, match="no certificate of a worker"):
            authority.key_of_worker(text, NOW)


@pytest.mark.parametrize("name", ["", " w", "w\n", "x" * 65])
def test_a_name_of_a_worker_is_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestRefused, match="the name of a worker has 1 to 64"):
        Authority(StateDir(tmp_path), NOW).worker_certificate(make_request("w")[1], name, NOW)


def test_a_request_that_is_none_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    other_curve = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    for request, why in (("", "no request"), ("x" * 1000, "no request"), (other_curve, "P-256")):
        with pytest.raises(RequestRefused, match=why):
            requested_key_digest(request)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 1, "current": {}, "bridge": "", "retired": []}'],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: bytes) -> None:
    Authority(StateDir(tmp_path), NOW)
    (tmp_path / "authority.json").write_bytes(damage)
    with pytest.raises(StateDirError, match=r"authority\.json: it is damaged"):
        Authority(StateDir(tmp_path), NOW)


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    Authority(StateDir(tmp_path), NOW)
    path = tmp_path / "authority.json"
    path.write_text(later := json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(StateDirError, match="written by a later version"):
        Authority(StateDir(tmp_path), NOW)
    assert path.read_text() == later


def test_a_rotation_that_cannot_be_kept_has_not_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateDir(tmp_path)
    authority = Authority(state, NOW)
    before = authority.trusted

    def full(name: str, content: bytes) -> None:
        raise StateDirError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(state, "write", full)
        with pytest.raises(StateDirError):
            authority.rotate(NOW)
    assert authority.trusted == before == Authority(StateDir(tmp_path), NOW).trusted


def replaced(pem: str, old: str, new: str) -> str:
    """Return a certificate, or a request for one, in which some bytes are others; both in hexadecimal digits."""
    first, *lines, last = pem.strip().splitlines()
    content = base64.b64decode("".join(lines))
    assert bytes.fromhex(old) in content
    content = content.replace(bytes.fromhex(old), bytes.fromhex(new), 1)
    return f"{first}\n{base64.encodebytes(content).decode()}{last}\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("a003020102", "a003020107", id="version"),
        pytest.param("0603551d0f", "0603551d13", id="an extension that is there twice"),
        pytest.param("06082a8648ce3d040302", "06082a8648ce3d040309", id="signature"),
        pytest.param("06082a8648ce3d030107", "06082a8648ce3d030109", id="curve"),
    ],
)
def test_a_certificate_that_cannot_be_read_is_refused(tmp_path: Path, old: str, new: str) -> None:
    authority = Authority(StateDir(tmp_path), NOW)
    certificate, _ = authority.worker_certificate(make_request("w1")[1], "w1", NOW)
    with pytest.raises(RequestRefused):
        authority.key_of_worker(replaced(certificate, old, new), NOW)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("020100", "020107", id="version"),
        pytest.param("06082a8648ce3d030107", "06082a8648ce3d030109", id="curve"),
        pytest.param("06082a8648ce3d040302", "06082a8648ce3d040309", id="signature"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(old: str, new: str) -> None:
    with pytest.raises(RequestRefused):
        requested_key_digest(replaced(make_request("w1")[1], old, new))


def ascii_start(text: str) -> str:
    return ascii(text[:4])


@pytest.mark.parametrize("name", ["", "w" * 65, "\u65e5" * 22, "\udcff" * 64], ids=ascii_start)
def test_any_name_can_be_asked_for_and_the_master_refuses_what_is_none(tmp_path: Path, name: str) -> None:
    key, request = make_request(name)
    assert requested_key_digest(request) == requested_key_digest(request_for(key, "w1"))
    with pytest.raises(RequestRefused, match="the name of a worker has 1 to 64"):
        Authority(StateDir(tmp_path), NOW).worker_certificate(request, name, NOW)
