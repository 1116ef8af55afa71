"""What opens a keystore: a passphrase, k of n officers' shares, or a hardware security module (DESIGN §5, "At rest").

Every secret in a keystore is sealed under one random key, its KEK. A *scheme* wraps that key, and the wrapped form, the
*sealing record*, is kept in the keystore beside what it opens (docs/spec/keystore-sealing.md). :mod:`record` is the
format, :mod:`schemes` wraps and unwraps, :mod:`shares` and :mod:`token` are the two that need more than a passphrase,
:mod:`attempts` says when the next guess may be made.
"""
