"""The cluster's own certificate authority, with which masters and workers recognize each other. Needs ``cryptography``.

Theory of operation
===================

A cluster needs no public key infrastructure: its master has an authority of its own, whose private key never leaves the
master's ``state_dir``. The authority signs two kinds of certificates. Those of *masters* may be used by servers only,
and all have the name :data:`MASTER_NAME` besides the names and addresses of the machine. A worker that was invited
trusts nothing but this authority and asks for that name, so it finds its master behind any address, and no other
certificate will do. Those of *workers* may be used by clients only, so a worker cannot pass itself off as a master.

*Everything is one file*, ``authority.json``, which is replaced as a whole. What other programs read (``ca.pem``) and
what OpenSSL reads (``server.pem``) is written from it, and written again at the next start if that failed.

*Rotation.* A new authority is made, and the old one signs it: ``bridge`` is the certificate of the new one by the old
one. Masters show it between their own certificate and the authority, so that a worker that knows only the old authority
accepts a certificate by the new one. The old one is trusted until ``until``, so that certificates of workers stay valid
until they have been renewed.

*Clocks.* Certificates begin to be valid :data:`_SKEW` before they are made, since clocks differ.

Keys are ECDSA with the curve P-256: what every TLS library has, and the cheapest handshake for a server.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..core.state_dir import StateDir

__all__ = [
    "GRACE",
    "MASTER_NAME",
    "RENEW_BEFORE",
    "Authority",
    "RequestRefused",
    "certificate_ends",
    "check_worker_name",
    "fingerprint",
    "make_request",
    "request_for",
    "requested_key_digest",
]

#: A name of every certificate of a master; workers that were invited ask for it.
MASTER_NAME: Final = "master.trio-cluster"

#: How long certificates are valid, and before their end how long they are renewed.
_AUTHORITY_VALID: Final = datetime.timedelta(days=3650)
SERVER_VALID: Final = datetime.timedelta(days=90)
WORKER_VALID: Final = datetime.timedelta(days=90)
RENEW_BEFORE: Final = datetime.timedelta(days=30)
#: How far the clock of another machine may be behind.
_SKEW: Final = datetime.timedelta(days=1)
#: How long an authority that was replaced is still trusted. Longer than a worker's certificate is valid.
GRACE: Final = datetime.timedelta(days=100)

_VERSION: Final = 1
_FILE: Final = "authority.json"
_REMEDY: Final = (
    "restore it from a backup, or remove it to make a new authority, which every worker has to join again"
)
_CA: Final = "ca.pem"
_SERVER: Final = "server.pem"
#: Bytes of the name of a worker in UTF-8, as X.509 limits a common name.
_MAX_NAME: Final = 64

#: What parsing a certificate, or a request for one, may raise. Some of these are no ``ValueError``.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class RequestRefused(ValueError):
    """A request for a certificate cannot be granted; the message says why."""


@attrs.define
class _Keys:
    """An authority: its certificate and private key, in PEM."""

    certificate: str
    key: str

    @property
    def parsed(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate.encode())

    @property
    def private(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self.key.encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


@attrs.define
class _Retired:
    """The certificate of an authority that was replaced, and until when it is trusted (a Unix time)."""

    certificate: str
    until: float


def _read_kept(data: dict[str, Any]) -> tuple[_Keys, str, list[_Retired]]:
    """Return the authority that a file has, its bridge, and those that it has replaced. See ``StateDir.load``."""
    current = _Keys(**data["current"])
    # What cannot be used is found here, and not when a worker joins.
    try:
        fits = current.parsed.public_key() == current.private.public_key()
    except (AssertionError, UnsupportedAlgorithm) as error:
        raise ValueError("the key is of another kind") from error
    if not fits:
        raise ValueError("the key is not that of the certificate")
    return current, data["bridge"], [_Retired(**each) for each in data["retired"]]


class Authority:
    """The authority of a cluster, kept in a master's state directory. All methods block.

    Args:
        state: where it is kept; an authority is made if there is none.
        now: the time, in UTC.

    Raises:
        StateDirError: it cannot be read or written, or was written by a later version.
    """

    def __init__(self, state: StateDir, now: datetime.datetime) -> None:
        self._state = state
        self._retired: list[_Retired]
        kept = state.load(_FILE, _VERSION, _read_kept, _REMEDY)
        if kept is None:
            self._current, self._bridge, self._retired = _make_authority(now), "", []
            self._save()
        else:
            self._current, self._bridge, self._retired = kept
        self._retired = [each for each in self._retired if each.until > now.timestamp()]
        self._export()

    def _save(self) -> None:
        data = {
            "current": attrs.asdict(self._current),
            "bridge": self._bridge,
            "retired": [attrs.asdict(each) for each in self._retired],
        }
        self._state.save(_FILE, _VERSION, data)

    def _export(self) -> None:
        if self._state.read(_CA) != self.trusted.encode():
            self._state.write(_CA, self.trusted.encode())

    @property
    def trusted(self) -> str:
        """The certificates of this authority, and of those that it has replaced a short while ago, in PEM."""
        return "".join([self._current.certificate, *(each.certificate for each in self._retired)])

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the certificate of the authority, in hexadecimal digits."""
        return fingerprint(self._current.certificate)

    def rotate(self, now: datetime.datetime, grace: datetime.timedelta = GRACE) -> None:
        """Replace the authority by a new one, and trust the old one for a while.

        Args:
            now: the time, in UTC.
            grace: how long the old one is still trusted.

        Raises:
            StateDirError: it cannot be kept; the old one stays.
        """
        before = old, _, _ = self._current, self._bridge, self._retired
        new = _make_authority(now)
        bridge = _sign(
            old,
            subject=new.parsed.subject,
            public_key=new.private.public_key(),
            begins=now - _SKEW,
            ends=min(now + grace, old.parsed.not_valid_after_utc),
            extensions=[(x509.BasicConstraints(ca=True, path_length=0), True), (_usage(signs=True), True)],
        )
        retired = _Retired(old.certificate, (now + grace).timestamp())
        self._current, self._bridge, self._retired = new, _pem(bridge), [retired, *self._retired]
        try:
            self._save()
        except BaseException:
            # Certificates by an authority that is gone after the next start would be worth nothing then.
            self._current, self._bridge, self._retired = before
            raise
        self._export()

    def server_certificate(self, names: Iterable[str], now: datetime.datetime) -> Path:
        """Return the file with this master's private key and certificate; made again if it is old or lacks a name.

        Args:
            names: the names and addresses under which the master is reached.
            now: the time, in UTC.
        """
        wanted = {MASTER_NAME, *names}
        path = self._state.path / _SERVER
        content = self._state.read(_SERVER)
        if content is None or not self._is_usable(content, wanted, now):
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _sign(
                self._current,
                subject=_subject(MASTER_NAME),
                public_key=key.public_key(),
                begins=now - _SKEW,
                ends=now + SERVER_VALID,
                extensions=[
                    (x509.BasicConstraints(ca=False, path_length=None), True),
                    (_usage(signs=False), True),
                    (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
                    (x509.SubjectAlternativeName([_general_name(name) for name in sorted(wanted)]), False),
                ],
            )
            # One file, so that key and certificate always belong together.
            self._state.write(_SERVER, (_key_pem(key) + _pem(certificate) + self._bridge).encode())
        return path

    def _is_usable(self, content: bytes, wanted: set[str], now: datetime.datetime) -> bool:
        try:
            certificate = x509.load_pem_x509_certificates(content)[0]
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (*_UNREADABLE, IndexError):
            return False
        if not _is_issued_by(certificate, self._current.parsed):
            return False
        held = {str(name) for name in names.get_values_for_type(x509.DNSName)}
        held |= {str(address) for address in names.get_values_for_type(x509.IPAddress)}
        # One that was made while the clock was ahead is of no use yet.
        return (
            wanted <= held
            and certificate.not_valid_before_utc <= now
            and now + RENEW_BEFORE < certificate.not_valid_after_utc
        )

    def key_of_worker(self, certificate: str, now: datetime.datetime) -> tuple[str, str, str]:
        """Check a worker's certificate.

        Args:
            certificate: in PEM.
            now: the time, in UTC.

        Returns:
            The name of the worker, the serial number in hexadecimal digits, and the digest of its public key.

        Raises:
            RequestRefused: it is not one of a worker by this authority, or it has expired.
        """
        try:
            parsed = x509.load_pem_x509_certificate(certificate.encode())
            (name,) = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            usage = parsed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except _UNREADABLE as error:
            raise RequestRefused("this is no certificate of a worker in PEM") from error
        if ExtendedKeyUsageOID.CLIENT_AUTH not in usage or not any(
            _is_issued_by(parsed, each) for each in x509.load_pem_x509_certificates(self.trusted.encode())
        ):
            raise RequestRefused("the certificate is not one of a worker by the authority of this cluster")
        if not parsed.not_valid_before_utc <= now <= parsed.not_valid_after_utc:
            raise RequestRefused("the certificate has expired; join again, with a new invitation")
        public = parsed.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        return str(name.value), f"{parsed.serial_number:x}", _key_digest(public)

    def worker_certificate(self, request: str, name: str, now: datetime.datetime) -> tuple[str, str]:
        """Grant a worker's request for a certificate.

        Args:
            request: the request in PEM (PKCS #10); the public key in it is all that is used of it.
            name: the name of the worker.
            now: the time, in UTC.

        Returns:
            The certificate in PEM, and its serial number in hexadecimal digits.

        Raises:
            RequestRefused: the request or the name is not valid.
        """
        check_worker_name(name)
        certificate = _sign(
            self._current,
            subject=_subject(name),
            public_key=_requested_key(request),
            begins=now - _SKEW,
            ends=now + WORKER_VALID,
            extensions=[
                (x509.BasicConstraints(ca=False, path_length=None), True),
                (_usage(signs=False), True),
                (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
            ],
        )
        return _pem(certificate), f"{certificate.serial_number:x}"


def fingerprint(certificate: str) -> str:
    """Return the SHA-256 of a certificate in PEM, in hexadecimal digits.

    Raises:
        ValueError: it is none.
    """
    return x509.load_pem_x509_certificate(certificate.encode()).fingerprint(hashes.SHA256()).hex()


def check_worker_name(name: str) -> None:
    """Refuse what cannot be the name of a worker in a certificate.

    Raises:
        RequestRefused: it cannot.
    """
    if not name.isprintable() or name != name.strip() or not 0 < len(name.encode()) <= _MAX_NAME:
        raise RequestRefused(
            f"the name of a worker has 1 to {_MAX_NAME} printable characters, and not more bytes in UTF-8"
        )


def make_request(name: str) -> tuple[str, str]:
    """Make a private key, and a request for a certificate for it. Returns both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _key_pem(key), request_for(_key_pem(key), name)


def request_for(key: str, name: str) -> str:
    """Return a request for a certificate for a private key; both in PEM.

    The name in it is for those who read it; what does not fit is cut off, and the master decides about the name.
    """
    private = serialization.load_pem_private_key(key.encode(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    short = name.encode(errors="replace")[:_MAX_NAME].decode(errors="ignore") or "worker"
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(short))
    return request.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def requested_key_digest(request: str) -> str:
    """Return the SHA-256 of the public key of a request, in hexadecimal digits: tells whether two are for one key.

    Raises:
        RequestRefused: the request is not valid.
    """
    return _key_digest(_requested_key(request))


def certificate_ends(certificate: str) -> datetime.datetime:
    """Return when a certificate in PEM expires, in UTC.

    Raises:
        ValueError: it is none.
    """
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc


def _key_digest(key: ec.EllipticCurvePublicKey) -> str:
    content = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(content).hexdigest()


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*_UNREADABLE, InvalidSignature):
        return False
    return True


def _requested_key(request: str) -> ec.EllipticCurvePublicKey:
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        public, signed = parsed.public_key(), parsed.is_signature_valid
    except _UNREADABLE as error:
        raise RequestRefused("this is no request for a certificate in PEM") from error
    if not signed:
        raise RequestRefused("the request for a certificate is not signed with its key")
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise RequestRefused("the key of a worker is ECDSA with the curve P-256")
    return public


def _make_authority(now: datetime.datetime) -> _Keys:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"trio_cluster authority {now:%Y-%m-%d %H:%M:%S}")
    unsigned = _Keys("", _key_pem(key))
    certificate = _sign(
        unsigned,
        subject=subject,
        public_key=key.public_key(),
        begins=now - _SKEW,
        ends=now + _AUTHORITY_VALID,
        # One more authority may stand between it and a master: the one by which it is replaced.
        extensions=[(x509.BasicConstraints(ca=True, path_length=1), True), (_usage(signs=True), True)],
    )
    return _Keys(_pem(certificate), unsigned.key)


def _sign(
    issuer: _Keys,
    *,
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    begins: datetime.datetime,
    ends: datetime.datetime,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    private = issuer.private
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.parsed.subject if issuer.certificate else subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False
        )
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(private, hashes.SHA256())


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
