"""mTLS identities: certificates with one SPIFFE-style URI each, and the gRPC credentials made from them.

A name is ``spiffe://<cluster>/<role>/<name>`` (SPIFFE-ID §2). The same name stands in the certificate as a DNS name,
``<name>.<role>.<cluster>.keyquorum``, because gRPC clients check DNS names and not URIs: dialling always overrides the
target name with it, so a peer is known by who it is and never by its address.

gRPC's BoringSSL offers X25519MLKEM768 first (draft-ietf-tls-ecdhe-mlkem), which a test pins by reading the handshake.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = [
    "MAX_MESSAGE",
    "CertificateAuthority",
    "TlsIdentity",
    "dns_name",
    "open_channel",
    "self_signed",
    "server_credentials",
    "spiffe_id",
]

MAX_MESSAGE = 64 << 20
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
)


def spiffe_id(cluster: str, role: str, name: str) -> str:
    return f"spiffe://{cluster}/{role}/{name}"


def dns_name(cluster: str, role: str, name: str) -> str:
    return f"{name}.{role}.{cluster}.keyquorum"


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def _builder(
    cluster: str, role: str, name: str, key: ec.EllipticCurvePrivateKey, now: int, days: int
) -> x509.CertificateBuilder:
    start = datetime.datetime.fromtimestamp(now, datetime.UTC) - datetime.timedelta(minutes=5)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{role} {name}")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.UniformResourceIdentifier(spiffe_id(cluster, role, name)),
                    x509.DNSName(dns_name(cluster, role, name)),
                ]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
    )


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> TlsIdentity:
    return TlsIdentity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def self_signed(cluster: str, role: str, name: str, *, now: int, days: int = 825) -> TlsIdentity:
    """A P-256 certificate that vouches for itself alone: peers pin it through the roster, and no authority exists
    whose loss would let someone else speak in this name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{role} {name}")])
    certificate = _builder(cluster, role, name, key, now, days).issuer_name(subject).sign(key, hashes.SHA256())
    return _pem(certificate, key)


class CertificateAuthority:
    """Issues the certificates of a coordinator's callers (owners, workers, operators), who come and go."""

    def __init__(self, identity: TlsIdentity) -> None:
        key = serialization.load_pem_private_key(identity.key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("the authority's key must be an elliptic-curve key")
        self._key = key
        self._certificate = x509.load_pem_x509_certificate(identity.certificate)
        self.identity = identity

    @classmethod
    def create(cls, cluster: str, *, now: int, days: int = 3650) -> CertificateAuthority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} callers")])
        start = datetime.datetime.fromtimestamp(now, datetime.UTC) - datetime.timedelta(minutes=5)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(_pem(certificate, key))

    def issue(self, cluster: str, role: str, name: str, *, now: int, days: int = 365) -> TlsIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(cluster, role, name, key, now, days).issuer_name(self._certificate.subject)
        return _pem(builder.sign(self._key, hashes.SHA256()), key)


def server_credentials(identity: TlsIdentity, client_roots: Sequence[bytes]) -> grpc.ServerCredentials:
    """Server side of mTLS. A client without a certificate under ``client_roots`` (PEM) does not get in."""
    if not client_roots:
        raise ValueError("a server without trusted client certificates would trust nobody or everybody")
    return grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)], root_certificates=b"\n".join(client_roots), require_client_auth=True
    )


def server_options() -> list[tuple[str, int]]:
    """Channel options of every server."""
    return [
        *_SERVER_OPTIONS,
        ("grpc.so_reuseport", 0),
        # Callers ping idle streams every 20 s (open_channel); the default would take that for abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def open_channel(
    address: str, identity: TlsIdentity, server_roots: Sequence[bytes], server_name: str
) -> grpc.aio.Channel:
    """Client side of mTLS. ``server_name`` is the DNS form of who must answer at ``address``."""
    credentials = grpc.ssl_channel_credentials(
        root_certificates=b"\n".join(server_roots),
        private_key=identity.key,
        certificate_chain=identity.certificate,
    )
    return grpc.aio.secure_channel(
        address,
        credentials,
        options=[
            *_SERVER_OPTIONS,
            ("grpc.ssl_target_name_override", server_name),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.initial_reconnect_backoff_ms", 200),
            # For how long one attempt may take, despite its name: a handshake is three round trips.
            ("grpc.min_reconnect_backoff_ms", 3_000),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ],
    )
