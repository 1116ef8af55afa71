"""The coordinator's log: what the sequencer writes, where, and in which order (docs/adr, docs/spec/ledger.md).

:mod:`leaf_store` holds leaves that no tile holds yet, and request ids; :mod:`checkpoint_store` the latest checkpoint;
:mod:`tile_store` full tiles and entry bundles, in an object store. :mod:`edge` is the tree's right edge in memory,
:mod:`keys` the log's keys, :mod:`setup` makes and checks all of it, :mod:`http` serves it.
"""
