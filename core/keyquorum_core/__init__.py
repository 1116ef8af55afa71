"""keyquorum's pure core: bytes and values in, values out.

Nothing here opens a socket, a file or a clock; ``now`` and randomness are arguments where they matter.
Start with :mod:`keyquorum_core.quorum` and :mod:`keyquorum_core.derivation`.
"""
