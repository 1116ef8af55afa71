"""A whole keyquorum cluster on one machine: real processes, real mTLS, development hardware.

For demonstrations, tests and development. Everything that a real deployment keeps apart (operators' keys, passphrases,
the hardware vendor) lies in one directory here, so it protects nothing; the processes are the real ones.
"""
