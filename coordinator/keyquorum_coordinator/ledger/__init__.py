"""The coordinator's log: what the sequencer writes, and where (docs/adr/0012-order-of-writes-in-the-ledger.md).

:mod:`leaf_store` holds leaves that no tile holds yet, and request ids; :mod:`checkpoint_store` the latest checkpoint;
:mod:`tile_store` full tiles and entry bundles, in an object store. :mod:`edge` is the tree's right edge in memory,
:mod:`log` all of them together, :mod:`setup` makes, opens and restores them, :mod:`http` serves what they hold.
"""
