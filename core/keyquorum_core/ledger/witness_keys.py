"""A witness's two verifier keys, types 0x04 and 0x06, as the roster names them for each custodian.

A custodian is a witness under the name ``<cluster>/<custodian id>``, which no other key of the cluster has.
"""

from __future__ import annotations

from dataclasses import dataclass

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.verifier_keys import SignatureType, VerifierKey

__all__ = ["MAX_WITNESS_KEY", "WitnessKeys", "witness_name"]

MAX_WITNESS_KEY = 4096
"""Characters in the two vkeys of one witness, or of one log."""


def witness_name(cluster: str, custodian_id: str) -> str:
    """The key name of a custodian as a witness."""
    return f"{cluster}/{custodian_id}"


@dataclass(frozen=True, slots=True)
class WitnessKeys:
    """Both keys of one witness, under one name. Raises :class:`MalformedError` when made with any others."""

    ed25519: VerifierKey
    ml_dsa_44: VerifierKey

    def __post_init__(self) -> None:
        types = (self.ed25519.type, self.ml_dsa_44.type)
        if (
            types != (SignatureType.ED25519_COSIGNATURE, SignatureType.ML_DSA_44)
            or self.ed25519.name != self.ml_dsa_44.name
        ):
            raise MalformedError(
                Reason.MALFORMED,
                "not the keys of one witness",
                expected="types 0x04 and 0x06 under one name",
                actual=f"types {types[0]:#04x} and {types[1]:#04x}, {self.ed25519.name} and {self.ml_dsa_44.name}",
            )

    @property
    def name(self) -> str:
        return self.ed25519.name

    @property
    def pair(self) -> tuple[VerifierKey, VerifierKey]:
        """Type 0x04, then 0x06: what :func:`keyquorum_core.ledger.cosignatures.witnessed` asks for."""
        return self.ed25519, self.ml_dsa_44

    def encode(self) -> str:
        """The two vkeys with a space between them: the ``witness_key`` of a roster entry."""
        return f"{self.ed25519.encode()} {self.ml_dsa_44.encode()}"

    @staticmethod
    def parse(text: str) -> WitnessKeys:
        """The strict inverse of :meth:`encode`. Raises :class:`MalformedError`, as :meth:`VerifierKey.parse` does."""
        parts = text.split(" ") if len(text) <= MAX_WITNESS_KEY else []
        if len(parts) != 2:
            raise MalformedError(
                Reason.MALFORMED,
                "not the keys of a witness",
                expected="two verifier keys, types 0x04 and 0x06",
                actual=ascii(text[:80]),
            )
        return WitnessKeys(VerifierKey.parse(parts[0]), VerifierKey.parse(parts[1]))
