"""A custodian wrecked and restored from a backup, as its operator and the cluster's would do it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable

from keyquorum_core.roster import RosterCustodian, sign_roster
from keyquorum_core.sealing import RecipientKey
from keyquorum_custodian.backing_up import write_backup
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.node import Node
from keyquorum_custodian.restoring import Restored, restore
from keyquorum_custodian.trust import load_operators
from tests.support.custodian import PASSPHRASE, Committee, equip

__all__ = ["KEY", "all_say", "approve", "back_up", "enrol", "restored", "wreck_and_restore"]

KEY = RecipientKey.generate()


def back_up(committee: Committee, custodian: str, recipients: Iterable[RecipientKey] = (KEY,)) -> bytes:
    """The backup of a custodian, open in this process or on disk."""
    config = load_config(committee.directory(custodian))
    node = committee.nodes.get(custodian)
    store = node.keystore if node is not None else Keystore.open(config.keystore, PASSPHRASE)
    sink = io.BytesIO()
    try:
        write_backup(sink, store, config, [each.public for each in recipients], int(committee.clock()))
    finally:
        if node is None:
            store.close()
    return sink.getvalue()


def restored(committee: Committee, custodian: str, backup: bytes) -> Restored:
    """Into the custodian's folder, whose old one is moved to ``ID.old`` first."""
    folder, operators = committee.directory(custodian), committee.folder / "operators.json"
    if folder.exists():
        folder.rename(folder.with_name(f"{custodian}.old"))
    return restore(
        io.BytesIO(backup),
        KEY,
        folder,
        PASSPHRASE,
        load_operators(operators),
        operators.read_bytes(),
        now=int(committee.clock()),
        opslimit=1,
        memlimit=8 << 10,
    )


def enrol(committee: Committee, card: RosterCustodian) -> None:
    """The next roster, with the card in the place of that custodian's, in everybody's folder. None may be open."""
    assert not committee.nodes
    old = committee.roster
    committee.roster = dataclasses.replace(
        old,
        version=old.version + 1,
        previous=old.digest,
        custodians=tuple(card if each.id == card.id else each for each in old.custodians),
    )
    committee.roster_envelope = sign_roster(committee.roster, [each.identity for each in committee.operators])
    (committee.folder / "roster.json").write_bytes(committee.roster_envelope)
    config = load_config(committee.directory(card.id))
    store = Keystore.open(config.keystore, committee.secrets.get(card.id, PASSPHRASE), module=config.pkcs11_module)
    committee.ledger.witnesses[card.id] = store.cosigner(card.witness_key.name)
    store.close()
    for custodian_id in committee.ids:
        equip(committee.folder, custodian_id, committee.owner.name)
        rosters = committee.directory(custodian_id) / "rosters"  # for whoever was away for several versions
        rosters.mkdir(exist_ok=True)
        (rosters / f"{committee.roster.version}.json").write_bytes(committee.roster_envelope)


def wreck_and_restore(committee: Committee, custodian: str, backup: bytes = b"") -> Restored:
    """Back up (unless it was done before), wreck, restore, enrol the new card; all closed afterwards."""
    backup = backup or back_up(committee, custodian)
    committee.close()
    made = restored(committee, custodian, backup)
    enrol(committee, made.card.custodian)
    return made


def approve(node: Node) -> None:
    """Its operator says yes."""
    (row,) = node.ceremonies.approvals.pending()
    assert row.kind == "restore"
    node.ceremonies.approvals.decide(row.request_id, row.subject, approve=True)


def all_say(committee: Committee, subject: str, nonce: bytes, *names: str) -> list[bytes]:
    """What these custodians (all the others, by default) testify."""
    asked = names or [name for name in committee.ids if name != subject]
    return [committee.open(name).restoration.testify(subject, nonce, {})[0] for name in asked]
