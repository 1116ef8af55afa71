"""Reading and verifying the ledger from outside: what an auditor does, with nothing but the roster and the read side.

:mod:`trust` says whom to believe, :mod:`source` and :mod:`http` where to read, :mod:`verification` recomputes a log
from its leaves, :mod:`proving` makes proofs for single leaves, :mod:`export` keeps a copy that verifies offline.
Every decision is :mod:`keyquorum_core.ledger`'s; here are the files, the sockets and the clock.
"""
