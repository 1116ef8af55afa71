"""Data keys without a cluster."""

from __future__ import annotations

from keyquorum.data_keys import DataKey
from keyquorum_core.derivation import DerivedKey, context, key_check
from keyquorum_core.key_request import key_subject

__all__ = ["data_key"]


def data_key(
    epoch: int,
    *,
    root: bytes = b"\x05" * 32,
    cluster: str = "test",
    owner: str = "alice",
    key_id: str = "demo",
    name: str = "files",
) -> DataKey:
    of = context(key_id, epoch, "data", key_subject(owner, name))
    return DataKey(
        DerivedKey(of, root, key_check(root, of)),
        cluster=cluster,
        owner=owner,
        key_id=key_id,
        epoch=epoch,
        name=name,
        classification="personal",
        export_control="",
    )
