"""Credentials for a TPM: what only the TPM that holds both an endorsement key and a named key can open.

``TPM2_MakeCredential`` as a verifier does it (TPM 2.0 Library Part 1, §24 "Credential Protection", §11.4.10 key
derivation, Annexes B.10.4 and C.6.4 for the seed), and ``TPM2_ActivateCredential`` (Part 3, §12.5) for one who has the
endorsement key in software: a development TPM.

The secret travels as::

    TPM2B_ID_OBJECT        = sized( TPM2B integrity ‖ AES-CFB(symmetric key, IV 0, TPM2B secret) )
    TPM2B_ENCRYPTED_SECRET = sized( RSA-OAEP(seed), label "IDENTITY\\0" )  or  sized( TPM2B x ‖ TPM2B y )

    symmetric key = KDFa(seed, "STORAGE", Name)         integrity = HMAC(KDFa(seed, "INTEGRITY"), ciphertext ‖ Name)

with the Name of the key that it is for, and the EK's name algorithm as the hash throughout. So the TPM gives the
secret out only if it holds a key of exactly that Name, whose public area says what that key may do.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.decrepit.ciphers.modes import CFB as CFB_MODE
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from keyquorum_core.attestation.tpm2_keys import check_ek
from keyquorum_core.attestation.tpm2_structures import HashAlgorithm, Public, sized
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["Credential", "activate_credential", "kdfa", "kdfe", "make_credential"]

_TOOLS_HEADER = bytes.fromhex("badcc0de00000001")  # tpm2-tools: magic and version of a credential file
_OAEP_LABEL = b"IDENTITY\0"
_HASH_OBJECTS: dict[str, hashes.HashAlgorithm] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}


@dataclass(frozen=True, slots=True)
class Credential:
    """What goes to the TPM; neither part is secret."""

    id_object: bytes
    """``TPM2B_ID_OBJECT``."""
    encrypted_secret: bytes
    """``TPM2B_ENCRYPTED_SECRET``."""

    def to_tools_file(self) -> bytes:
        """The file that ``tpm2_activatecredential --credential-blob`` reads."""
        return _TOOLS_HEADER + self.id_object + self.encrypted_secret


@dataclass(frozen=True, slots=True)
class _Protection:
    """The keys that a seed gives."""

    hash: HashAlgorithm
    symmetric_key: bytes = field(repr=False)
    integrity_key: bytes = field(repr=False)
    name: bytes

    def crypt(self, data: bytes, *, encrypt: bool) -> bytes:
        cipher = Cipher(algorithms.AES(self.symmetric_key), CFB_MODE(bytes(16)))
        context = cipher.encryptor() if encrypt else cipher.decryptor()
        return context.update(data) + context.finalize()

    def integrity(self, ciphertext: bytes) -> bytes:
        return hmac.new(self.integrity_key, ciphertext + self.name, self.hash.name).digest()


def make_credential(
    ek: Public, name: bytes, secret: bytes, rng: Callable[[int], bytes] = secrets.token_bytes
) -> Credential:
    """Protect ``secret`` for the TPM that holds ``ek`` and a key of Name ``name``.

    ``secret`` has 16 bytes up to the size of the EK's name algorithm. ``rng`` gives the seed for an RSA key; OAEP's own
    randomness, and the ephemeral key for an ECC one, come from the library that encrypts.
    Raises :class:`MalformedError` for a secret or Name of another size, and as
    :func:`~keyquorum_core.attestation.tpm2_keys.check_ek`.
    """
    key = check_ek(ek).key
    algorithm = ek.name_hash
    if not 16 <= len(secret) <= algorithm.size or not 2 < len(name) <= 66:
        raise MalformedError(
            Reason.MALFORMED,
            "a credential needs a secret and a Name",
            expected=f"a secret of 16 … {algorithm.size} bytes and a Name of up to 66",
            actual=f"{len(secret)} and {len(name)} bytes",
        )
    if isinstance(key, rsa.RSAPublicKey):
        seed = rng(algorithm.size)
        encrypted = key.encrypt(seed, _oaep(algorithm))
    else:
        ephemeral = ec.generate_private_key(key.curve)
        ours = ephemeral.public_key().public_numbers()
        seed = _ecdh_seed(ephemeral, key, ours.x, key.public_numbers().x, algorithm)
        encrypted = b"".join(sized(_coordinate(each, key.curve)) for each in (ours.x, ours.y))
    protection = _protection(ek, seed, name)
    ciphertext = protection.crypt(sized(secret), encrypt=True)
    return Credential(
        id_object=sized(sized(protection.integrity(ciphertext)) + ciphertext),
        encrypted_secret=sized(encrypted),
    )


def activate_credential(
    ek_private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, ek: Public, name: bytes, credential: Credential
) -> bytes:
    """Open a credential as the TPM would that holds ``ek_private`` and a key of Name ``name``.

    Raises :class:`RefusedError` ``UNSEAL``: for another EK, for another Name, altered.
    """
    algorithm = ek.name_hash
    try:
        encrypted, rest = _unsized(credential.encrypted_secret)
        if rest:
            raise ValueError
        if isinstance(ek_private, rsa.RSAPrivateKey):
            seed = ek_private.decrypt(encrypted, _oaep(algorithm))
        else:
            x, rest = _unsized(encrypted)
            y, rest = _unsized(rest)
            theirs = ec.EllipticCurvePublicNumbers(
                int.from_bytes(x, "big"), int.from_bytes(y, "big"), ek_private.curve
            ).public_key()
            ours = ek_private.public_key().public_numbers().x
            seed = _ecdh_seed(ek_private, theirs, theirs.public_numbers().x, ours, algorithm)
        protection = _protection(ek, seed, name)
        inner, outer_rest = _unsized(credential.id_object)
        integrity, ciphertext = _unsized(inner)
        if rest or outer_rest or not hmac.compare_digest(integrity, protection.integrity(ciphertext)):
            raise ValueError
        secret, rest = _unsized(protection.crypt(ciphertext, encrypt=False))
        if rest:
            raise ValueError
    except ValueError:
        raise RefusedError(
            Reason.UNSEAL, "the credential is not for this endorsement key and this Name", expected="both", actual=None
        ) from None
    return secret


def kdfa(algorithm: HashAlgorithm, key: bytes, label: str, context_u: bytes, context_v: bytes, bits: int) -> bytes:
    """KDFa (Part 1, §11.4.10.2): SP 800-108 in counter mode with HMAC. ``bits`` is a multiple of 8."""
    fixed = label.encode() + b"\0" + context_u + context_v + bits.to_bytes(4, "big")
    blocks = range(1, -(-bits // (8 * algorithm.size)) + 1)
    out = b"".join(hmac.new(key, each.to_bytes(4, "big") + fixed, algorithm.name).digest() for each in blocks)
    return out[: bits // 8]


def kdfe(algorithm: HashAlgorithm, z: bytes, label: str, party_u: bytes, party_v: bytes, bits: int) -> bytes:
    """KDFe (Part 1, §11.4.10.3): SP 800-56A's one-step derivation with a hash. ``bits`` is a multiple of 8."""
    fixed = z + label.encode() + b"\0" + party_u + party_v
    blocks = range(1, -(-bits // (8 * algorithm.size)) + 1)
    out = b"".join(hashlib.new(algorithm.name, each.to_bytes(4, "big") + fixed).digest() for each in blocks)
    return out[: bits // 8]


def _protection(ek: Public, seed: bytes, name: bytes) -> _Protection:
    algorithm = ek.name_hash
    bits = ek.symmetric[1] if ek.symmetric else 0  # check_ek leaves 128, 192 or 256
    return _Protection(
        hash=algorithm,
        symmetric_key=kdfa(algorithm, seed, "STORAGE", name, b"", bits),
        integrity_key=kdfa(algorithm, seed, "INTEGRITY", b"", b"", 8 * algorithm.size),
        name=name,
    )


def _oaep(algorithm: HashAlgorithm) -> padding.OAEP:
    chosen = _HASH_OBJECTS[algorithm.name]
    return padding.OAEP(mgf=padding.MGF1(chosen), algorithm=chosen, label=_OAEP_LABEL)


def _ecdh_seed(
    private: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    ephemeral_x: int,
    ek_x: int,
    algorithm: HashAlgorithm,
) -> bytes:
    z = private.exchange(ec.ECDH(), public)
    ephemeral, static = (_coordinate(each, public.curve) for each in (ephemeral_x, ek_x))
    return kdfe(algorithm, z, "IDENTITY", ephemeral, static, 8 * algorithm.size)


def _coordinate(value: int, curve: ec.EllipticCurve) -> bytes:
    return value.to_bytes((curve.key_size + 7) // 8, "big")


def _unsized(data: bytes) -> tuple[bytes, bytes]:
    """The content of a sized field, and what follows it."""
    end = 2 + int.from_bytes(data[:2], "big")
    if len(data) < max(2, end):
        raise ValueError
    return data[2:end], data[end:]
