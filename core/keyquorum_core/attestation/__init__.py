"""Attestation: what a worker's hardware says about it, and whether this custodian accepts that (DESIGN §7).

Two questions, kept apart. *Verification* (:mod:`~keyquorum_core.attestation.sev_snp`): is the evidence genuine, that
is, signed by hardware whose vendor's root is pinned? *Appraisal* (:mod:`~keyquorum_core.attestation.appraisal`): do the
reference values (:mod:`~keyquorum_core.attestation.reference`) accept it, and is it bound to the keys that ask? Both
fail closed, and neither has a check that an empty expected value turns off. Everything is offline: endorsements
travel with the evidence in one document (:mod:`~keyquorum_core.attestation.evidence`), and ``now`` is passed in.
"""
