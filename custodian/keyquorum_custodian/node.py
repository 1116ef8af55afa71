"""One custodian put together from its folder, without a network: what the server, and tests, talk to.

Opening checks everything on disk against everything else, and refuses to serve when anything does not fit: the keystore
is this custodian's, its identity, HPKE key and TLS certificate are those the operators put in the roster, the roster is
current and not rolled back, and every seed of every active epoch is the one its certificate commits to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keyquorum_core.attestation.inventory import INVENTORY
from keyquorum_core.attestation.reference import REFERENCE_VALUES
from keyquorum_core.bulletin import Kind
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.witness_keys import witness_name
from keyquorum_core.policy.facts import QuorumFacts, Seat
from keyquorum_core.revocations import REVOCATIONS
from keyquorum_core.roster import Roster, open_roster
from keyquorum_core.succession import open_successor
from keyquorum_custodian.appraisals import Appraisals
from keyquorum_custodian.bulletins import Bulletins
from keyquorum_custodian.canary import CanaryFaults
from keyquorum_custodian.ceremonies import Ceremonies
from keyquorum_custodian.ceremony_seat import CeremonySeat
from keyquorum_custodian.certificates import Certificates
from keyquorum_custodian.config import CustodianConfig, load_config
from keyquorum_custodian.epochs import Epochs, load_epoch
from keyquorum_custodian.gate import Gate
from keyquorum_custodian.init import TLS_CERTIFICATE, TLS_KEY
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.leases import Leases
from keyquorum_custodian.ledger_store import Alarm, LedgerStore
from keyquorum_custodian.logs import logger
from keyquorum_custodian.policy import POLICY_KINDS, CustodianPolicy, KeptTime, policy_kinds
from keyquorum_custodian.quarantine import Quarantine, QuarantineEntry
from keyquorum_custodian.quota import Quota
from keyquorum_custodian.restoration import Restoration
from keyquorum_custodian.sealing.schemes import Secret
from keyquorum_custodian.seed_records import DESTROYED
from keyquorum_custodian.standing import Standing
from keyquorum_custodian.tpms import Tpms
from keyquorum_custodian.trust import Owners, load_operators
from keyquorum_custodian.windows import Windows
from keyquorum_custodian.withdrawn import Withdrawn
from keyquorum_custodian.witness import Witness
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.tls import TlsIdentity

__all__ = ["BULLETIN_KINDS", "Node", "assemble", "load_roster", "open_node"]

BULLETIN_KINDS: tuple[Kind[object], ...] = (REFERENCE_VALUES, INVENTORY)
"""The signed operator documents that this custodian has a use for."""


@dataclass(slots=True)
class Node:
    """A custodian ready to serve. ``releases`` and ``refusals`` count since ``started_at`` (unix seconds)."""

    config: CustodianConfig
    keystore: Keystore
    roster: Roster
    roster_digest: str
    bulletins: Bulletins
    policy: CustodianPolicy
    windows: Windows
    epochs: Epochs
    witness: Witness
    quarantine: Quarantine
    leases: Leases
    withdrawn: Withdrawn
    gate: Gate
    ceremonies: Ceremonies
    standing: Standing
    restoration: Restoration
    canary: CanaryFaults
    tls_identity: TlsIdentity
    clock: Callable[[], float]
    started_at: int
    releases: int = 0
    refusals: int = 0

    @property
    def trusts_development(self) -> bool:
        """The reference values in force, or that would be if they were in date, name a development root."""
        accepted = self.bulletins.accepted(REFERENCE_VALUES)
        return accepted is not None and accepted.value.trusts_development

    def warnings(self) -> list[str]:
        """What the operator should not get used to."""
        out = []
        if self.trusts_development:
            out.append(
                "DEVELOPMENT HARDWARE IS TRUSTED: the reference values name a development root, so evidence that no"
                " hardware made can be accepted. Never do this in production."
            )
        if self.standing.restored:
            out.append(
                "RESTORED FROM A BACKUP: nothing is released or cosigned until you approved the restore and the other"
                " custodians testified; see section 8 of docs/operators.md"
            )
        out += [
            f"{key_id} epoch {epoch} is WITHHELD: {', '.join(names)} say that it was destroyed since the backup"
            for (key_id, epoch), names in sorted(self.standing.withheld.items())
            if (row := self.keystore.epoch(key_id, epoch)) is not None and row.state != DESTROYED
        ]
        out += [
            f"LEDGER ALARM {alarm.number}: proof of a {alarm.kind}. Nothing is released until it is cleared; see"
            " `keyquorum-custodian ledger alarms`."
            for alarm in self.witness.open_alarms
        ]
        if self.quarantine.in_force:
            out.append(
                f"{self.quarantine.in_force} QUARANTINED: workers whose attestation failed anew; see"
                " `keyquorum-custodian quarantine list`."
            )
        if self.roster.log_key is None:
            out.append("the roster names no ledger: nothing is released")
        if self.roster.expires_at - self.clock() < 14 * 86400:
            out.append("the roster expires within 14 days; have the operators sign a new one")
        out += [
            f"no {kind.name} accepted: no worker gets a share; see step 4 of docs/operators.md"
            for kind in BULLETIN_KINDS
            if not self.bulletins.digest(kind.name)
        ]
        return out + self.bulletins.warnings()

    def close(self) -> None:
        """Let go of the seeds and close the keystore."""
        self.epochs.wipe()
        self.keystore.close()


def open_node(
    directory: Path,
    secret: Secret,
    *,
    clock: Callable[[], float] = time.time,
    keystore: type[Keystore] = Keystore,
) -> Node:
    """Open a custodian's folder with what its keystore is sealed under. Raises the typed error of whatever does not
    fit, and then holds nothing open."""
    config = load_config(directory)
    return assemble(config, keystore.open(config.keystore, secret, module=config.pkcs11_module), clock)


def assemble(config: CustodianConfig, store: Keystore, clock: Callable[[], float]) -> Node:
    """The custodian around its open keystore. Raises as :func:`open_node`; then the keystore is closed."""
    try:
        return _assemble(config, store, clock)
    except BaseException:
        store.close()
        raise


def load_roster(config: CustodianConfig, now: int) -> tuple[Roster, bytes]:
    """The roster on disk, signed by the pinned operators and in date, and its envelope. Raises their errors."""
    operators = load_operators(config.path(config.operators))
    envelope = read_bytes(config.path(config.roster), "the roster", 16 << 20)
    return open_roster(envelope, operators.identities, operators.threshold, now, cluster=config.cluster), envelope


def load_tls(config: CustodianConfig) -> TlsIdentity:
    """Raises ``NOT_FOUND`` or ``STORAGE``."""
    return TlsIdentity(
        read_bytes(config.path(TLS_CERTIFICATE), "the TLS certificate", 64 << 10),
        read_bytes(config.path(TLS_KEY), "the TLS key", 64 << 10),
    )


def _assemble(config: CustodianConfig, store: Keystore, clock: Callable[[], float]) -> Node:
    now = int(clock())
    identity, recipient = store.identity(), store.recipient()
    cosigner = store.cosigner(witness_name(config.cluster, config.id))
    roster, envelope = load_roster(config, now)
    tls_identity = load_tls(config)
    entry = roster.custodian(config.id)
    for what, expected, actual in (
        ("id of the keystore", config.id, store.custodian_id),
        ("jurisdiction", entry.jurisdiction, config.jurisdiction),
        ("identity", entry.identity.fingerprint, identity.public.fingerprint),
        ("HPKE key", entry.hpke.hex()[-32:], recipient.public.hex()[-32:]),
        ("witness key", entry.witness_key.encode()[:80], cosigner.witness_key.encode()[:80]),
        ("TLS certificate", entry.tls_certificate, tls_identity.certificate.decode("ascii", "replace")),
    ):
        if expected != actual:
            raise RefusedError(
                Reason.ROSTER,
                f"the {what} on disk is not the one in the roster",
                expected=expected,
                actual=actual,
                next_step="Enrol this custodian with its own card, or serve from the folder that was enrolled.",
            )
    digest = roster.digest
    _accept_roster(config, roster, envelope, store)
    seat = Seat("custodian", config.id, config.jurisdiction)
    steady = KeptTime(clock, store)
    bulletins = _open_bulletins(config, roster, store, seat, steady)
    policy = CustodianPolicy(seat, QuorumFacts.of(roster.quorum_of()), bulletins, steady)
    epochs, certificates = Epochs(store), Certificates(store)
    standing = Standing(store)
    for row in store.epochs():
        if row.state != DESTROYED and (row.key_id, row.epoch) not in standing.withheld:
            epochs.add(load_epoch(store, row, config.id, certificates))
    windows = Windows(config.cluster, config.id, identity, clock)
    witness = Witness(
        LogTrust(roster.log_key, roster.witnesses(), roster.quorum_of()) if roster.log_key is not None else None,
        cosigner,
        LedgerStore(store),
        clock,
        max_age=config.max_cosignature_age,
        on_alarm=_say,
        may_cosign=standing.require_proved,
    )
    appraisals = Appraisals(bulletins, config.id, windows, store, Tpms(store))
    quarantine = Quarantine(store, _say_quarantined)
    leases = Leases(store, appraisals, quarantine)
    withdrawn = Withdrawn(bulletins, leases, appraisals)
    canary = CanaryFaults(config, store, epochs, certificates, recipient, roster.quorum_of(), roster.log_key, clock)
    gate = Gate(
        config.id,
        roster_expires_at=roster.expires_at,
        owners=Owners(config.path(config.owners)),
        epochs=epochs,
        canary=canary,
        leases=leases,
        withdrawn=withdrawn,
        roster_digest=digest,
        appraisals=appraisals,
        windows=windows,
        policy=policy,
        quota=Quota(config.releases_per_owner_per_hour, store.releases_since(now - 3600)),
        witness=witness,
        keystore=store,
        standing=standing,
        clock=clock,
    )
    ceremony_seat = CeremonySeat(
        config.id,
        identity,
        recipient,
        roster,
        digest,
        roster.quorum_of(),
        store,
        epochs,
        certificates,
        clock,
        canary,
        standing,
    )
    ceremonies = Ceremonies(ceremony_seat, policy, config.auto_approve)
    ceremonies.resume()
    restoration = Restoration(
        config.id,
        identity,
        roster,
        keystore=store,
        standing=standing,
        approvals=ceremonies.approvals,
        bulletins=bulletins,
        kinds=tuple(kind.name for kind in (*BULLETIN_KINDS, REVOCATIONS)),
        epochs=epochs,
        witness=witness,
        clock=clock,
    )
    return Node(
        config=config,
        keystore=store,
        roster=roster,
        roster_digest=digest,
        bulletins=bulletins,
        policy=policy,
        windows=windows,
        epochs=epochs,
        witness=witness,
        quarantine=quarantine,
        leases=leases,
        withdrawn=withdrawn,
        gate=gate,
        ceremonies=ceremonies,
        standing=standing,
        restoration=restoration,
        canary=canary,
        tls_identity=tls_identity,
        clock=clock,
        started_at=now,
    )


def _say(alarm: Alarm) -> None:
    logger().error("LEDGER ALARM: releases stop", alarm=alarm.number, kind=alarm.kind)


def _accept_roster(config: CustodianConfig, roster: Roster, envelope: bytes, store: Keystore) -> None:
    """Serve under this roster from now on, if it is the one served under before or follows it.

    The versions in between, if there are any, lie in the folder of rosters. Raises :class:`RefusedError` (``ROSTER``,
    ``SIGNATURE…``).
    """
    newest = store.newest_roster()
    if newest is None:  # the pinned operators vouch for the first one
        store.keep_roster(roster.digest, roster.version, roster.payload())
        return
    version, digest, payload = newest
    if roster.version < version or (roster.version == version and roster.digest != digest):
        raise RefusedError(
            Reason.ROSTER,
            "the roster on disk is older than one this custodian served under, or contradicts it",
            expected=f"version {version} ({digest}) or newer",
            actual=f"version {roster.version} ({roster.digest})",
        )
    current = Roster.parse(payload)
    while current.version < roster.version:
        number = current.version + 1
        path = config.path(config.rosters) / f"{number}.json"
        step = envelope if number == roster.version else read_bytes(path, f"version {number} of the roster", 16 << 20)
        current = open_successor(step, current)
        store.keep_roster(current.digest, current.version, current.payload())


def _say_quarantined(entry: QuarantineEntry) -> None:
    logger().error(
        "WORKER QUARANTINED: it gets no key here until that is lifted",
        entry=entry.number,
        subjects=list(entry.subjects),
        reason=entry.reason,
        why=entry.message,
        job=entry.job_id,
        evidence=entry.evidence_sha256,
    )


def _open_bulletins(config: CustodianConfig, roster: Roster, store: Keystore, seat: Seat, time: KeptTime) -> Bulletins:
    """The documents of :data:`BULLETIN_KINDS`, signed by as many operators as the roster and this custodian ask for;
    its policies and lists, signed by whom its configuration says."""
    signers = load_operators(config.path(config.policy_signers), "the file of policy signers")
    operators = roster.operator_identities()
    threshold = max(roster.operator_threshold, config.bulletin_threshold)
    if threshold > len(operators):
        raise RefusedError(
            Reason.ROSTER,
            "bulletin_threshold asks for more operators than there are",
            expected=f"at most {len(operators)}",
            actual=threshold,
        )
    return Bulletins(
        config.path(config.bulletins),
        (*BULLETIN_KINDS, REVOCATIONS, *policy_kinds(seat)),
        cluster=config.cluster,
        operators=operators,
        threshold=threshold,
        keystore=store,
        clock=time.now,
        own_signers=dict.fromkeys(POLICY_KINDS, signers),
    )
