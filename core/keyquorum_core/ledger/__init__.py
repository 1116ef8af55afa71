"""The ledger's formats, pure: RFC 6962 trees and the C2SP documents around them (DESIGN §8, docs/spec/ledger.md).

:mod:`leaves` are what a log says. :mod:`merkle` verifies proofs and :mod:`proofs` builds them, from :mod:`compact`
ranges or a :mod:`tile_tree` over :mod:`tiles`; :mod:`replay` verifies a whole log from its leaves. :mod:`notes` carry
:mod:`checkpoints`, signed by the log (:mod:`log_keys`) and its witnesses (:mod:`cosignatures`) under
:mod:`verifier_keys`; :mod:`log_trust` is a reader's rule by the roster. :mod:`tlog_proof` and :mod:`witness_policy` are
the files an auditor needs; :mod:`add_checkpoint` is what a witness is asked.
"""
