"""Attestation: what a worker's hardware says about it, and whether this custodian accepts that (DESIGN §7).

Two questions, kept apart, for each of five types. *Verification* (``sev_snp``, ``tdx``, ``tpm2``, ``nvidia_gpu``,
``nitro``): is the evidence genuine, that is, signed by hardware whose vendor's root is pinned? *Appraisal*
(``snp_appraisal`` and its four siblings): do the reference values (:mod:`~keyquorum_core.attestation.reference`) accept
it? Both fail closed, and neither has a check that an empty expected value turns off. An appraisal is a list of findings
(:mod:`~keyquorum_core.attestation.findings`), so that a refusal can be explained as a whole.

:mod:`~keyquorum_core.attestation.appraisal` puts them together for one document
(:mod:`~keyquorum_core.attestation.evidence`): all required types, all bound to the keys that ask and to one challenge
(:mod:`~keyquorum_core.attestation.binding`), all of one machine (:mod:`~keyquorum_core.attestation.inventory`).
Everything is offline: endorsements travel with the evidence, and ``now`` is passed in.
"""
