"""Contexts for TLS: what each port and each client demands of its peer. Only the standard library.

All speak TLS 1.2 and 1.3 with the ciphers that OpenSSL recommends. TLS 1.2 cannot be renegotiated, since a client could
make a server compute for ever with that.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from ..errors import ClusterError

__all__ = ["CertificateError", "client_context", "server_context", "unverified_context"]


class CertificateError(ClusterError):
    """A certificate, a key or a list of authorities cannot be used; the message names the file."""


def server_context(
    certificate: Path, key: Path | None, *, alpn: list[str], clients: str | None = None, tickets: bool = True
) -> ssl.SSLContext:
    """Return the context of a port. Blocks: it reads the files.

    Args:
        certificate: a PEM file with the certificate of the server, and those between it and its authority.
        key: a PEM file with its private key; ``None``: it is in the same file.
        alpn: the protocols to offer.
        clients: the authorities, in PEM, that sign certificates of clients. A client may show one, and need not; one
            that is not from them ends the handshake. ``None``: clients are not asked for one.
        tickets: whether a client may resume a session. A resumed one is not checked again.

    Raises:
        CertificateError: a file cannot be read or used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:
        # ssl.SSLError is an OSError, too.
        raise CertificateError(_why(certificate, key, error)) from error
    context.set_alpn_protocols(alpn)
    if clients is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=clients)
    if not tickets:
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return context


def client_context(
    *, ca_file: Path | None = None, authority: str | None = None, certificate: Path | None = None
) -> ssl.SSLContext:
    """Return the context of a client, which checks the chain and the name of the server. Blocks: it reads the files.

    Args:
        ca_file: a PEM file of authorities to trust besides those of the system.
        authority: authorities in PEM that are the only ones to trust.
        certificate: a PEM file with the own private key and certificate.

    Raises:
        CertificateError: a file cannot be read or used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    if authority is not None:
        context.load_verify_locations(cadata=authority)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            raise CertificateError(f"ca_file {ca_file}: {_reason(error, 'certificate')}") from error
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, password=_no_password)
        except OSError as error:
            raise CertificateError(_why(certificate, None, error)) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def unverified_context() -> ssl.SSLContext:
    """Return the context of a client that trusts everybody, and therefore must not send anything that is secret."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


def _no_password() -> str:
    # Otherwise OpenSSL would ask for it on the terminal, and the whole process would wait.
    raise CertificateError("the private key has a password; give one without")


def _why(certificate: Path, key: Path | None, error: OSError) -> str:
    for name, path in (("tls_cert", certificate), ("tls_key", key)):
        if path is not None:
            try:
                path.read_bytes()
            except OSError as problem:
                return f"{name} {path}: {_reason(problem, 'certificate')}"
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return f"tls_key {key or certificate}: it is not the key of the certificate in {certificate}"
    return f"tls_cert {certificate}, tls_key {key or certificate}: {_reason(error, 'certificate and private key')}"


def _reason(error: OSError, expected: str) -> str:
    if isinstance(error, ssl.SSLError):
        return f"there is no {expected} in PEM in it ({error.reason or error})"
    return error.strerror or str(error)
