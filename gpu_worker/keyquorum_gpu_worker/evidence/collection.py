"""All the evidence of one worker, in the order in which it can be had: GPUs first, then whatever commits to them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from keyquorum_core.attestation.binding import gpu_digest
from keyquorum_core.attestation.evidence import NVIDIA_GPU, EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.release import challenge
from keyquorum_gpu_worker.evidence.source import Binding, EvidenceSource

__all__ = ["Collection"]


class Collection:
    """The sources of one worker, of distinct types, at least one of them other than a GPU.

    GPU evidence alone proves a GPU, and nothing about the software that uses it: there must be something that measured
    that. Raises :class:`MalformedError` where this does not hold.
    """

    def __init__(self, sources: Sequence[EvidenceSource]) -> None:
        types = [each.type for each in sources]
        if len(set(types)) != len(types) or not set(types) - {NVIDIA_GPU}:
            raise MalformedError(
                Reason.MALFORMED,
                "these sources of evidence do not make a worker's evidence",
                expected="each type once, and one that measures the software that runs here",
                actual=", ".join(types) or "none",
            )
        self._gpus = [each for each in sources if each.type == NVIDIA_GPU]
        self._others = [each for each in sources if each.type != NVIDIA_GPU]

    @property
    def types(self) -> tuple[str, ...]:
        """In the order of the document."""
        return tuple(each.type for each in (*self._gpus, *self._others))

    @property
    def development(self) -> bool:
        """Whether some of it proves nothing."""
        return any(each.development for each in (*self._gpus, *self._others))

    @property
    def name(self) -> str:
        """For people and logs: the types, or ``development``."""
        return "development" if self.development else ", ".join(self.types)

    def collect(self, binding: Binding) -> tuple[EvidenceItem, ...]:
        """One item of each source, GPUs first. Blocking. Raises what the sources raise."""
        gpus = [each.collect(binding) for each in self._gpus]
        bound = binding.with_gpus(gpu_digest([item.evidence for item in gpus]))
        return (*gpus, *(each.collect(bound) for each in self._others))

    def probe(self) -> None:
        """See that all of it can be had now, over a challenge that nobody made. Blocking. Raises what the sources
        raise."""
        self.collect(Binding(secrets.token_bytes(32), secrets.token_bytes(32), secrets.token_bytes(32)))

    def document(self, nonces: Sequence[WindowNonce], hpke_key: bytes, signing_key: bytes) -> EvidenceDocument:
        """The evidence document over these nonces and keys. Blocking. Raises what the sources raise, and
        :class:`MalformedError` for nonces that are none."""
        ordered = tuple(sorted(nonces, key=lambda each: each.custodian))
        asked = challenge({each.custodian: each.nonce for each in ordered})
        return EvidenceDocument(ordered, hpke_key, signing_key, self.collect(Binding(hpke_key, signing_key, asked)))
