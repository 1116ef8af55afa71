"""A committee of real custodians on disk, for whoever needs custodians in a test or a benchmark.

:func:`build_committee` makes the folders as ``keyquorum-custodian init`` does, a roster signed by an operator, an owner
``alice`` whom all of them know, and reference values and an inventory that accept the development chip. Custodians are
then opened in this process (:attr:`Committee.nodes`) or started as real ones (:func:`start_custodian_process`); a
keystore is open in one place at a time.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from keyquorum_core import keywrap, manifest
from keyquorum_core.attestation.development import DevelopmentChip
from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.ceremony_plan import CeremonyPlan, new_ceremony_id
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.presentation import sign_presentation
from keyquorum_core.quorum import Quorum
from keyquorum_core.release import Leaf
from keyquorum_core.roster import Operator, Roster, RosterCustodian, sign_roster
from keyquorum_core.sealing import RecipientKey, Suite
from keyquorum_core.signing import Identity
from keyquorum_custodian.config import CustodianConfig
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.init import initialise
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.node import Node, open_node
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire import tls
from tests.support import policies
from tests.support.ceremonies import Make, order
from tests.support.ledger import MemoryLog, update_message
from tests.support.vendor import MEASUREMENT, bulletin, evidence_document, inventory_json, reference_json

__all__ = [
    "PASSPHRASE",
    "THREE",
    "TWO_OF_THREE",
    "Committee",
    "CustodianProcess",
    "build_committee",
    "equip",
    "new_roster",
    "save_keys",
    "start_custodian_process",
]

PASSPHRASE = "only for tests"
THREE = (("ch-1", "CH"), ("is-1", "IS"), ("no-1", "NO"))
TWO_OF_THREE: Mapping[str, object] = {"at_least": 2}
_DAY = 86400
# Argon2id at its cheapest: these passphrases protect nothing.
_OPSLIMIT, _MEMLIMIT = 1, 8 << 10


def save_keys(folder: Path, name: str, role: str) -> LoadedKeys:
    """New keys of an owner or operator, written as ``NAME.key.json`` and ``NAME.pub.json`` under :data:`PASSPHRASE`."""
    keys = LoadedKeys(name, role, Identity.generate(), RecipientKey.generate())
    blob = keywrap.save_keys(
        keys.identity, keys.recipient, PASSPHRASE, role, name, opslimit=_OPSLIMIT, memlimit=_MEMLIMIT
    )
    (folder / f"{name}.key.json").write_bytes(blob)
    public = {
        "name": name,
        "role": role,
        "identity": base64.b64encode(keys.identity.public.to_bytes()).decode(),
        "hpke": base64.b64encode(keys.recipient.public).decode(),
    }
    (folder / f"{name}.pub.json").write_text(json.dumps(public))
    return keys


@dataclass(repr=False)
class Committee:
    """Custodians, and everybody around them. ``folder/ID`` is a custodian's; ``clock`` is what open nodes go by."""

    folder: Path
    roster: Roster
    roster_envelope: bytes
    operator: LoadedKeys
    owner: LoadedKeys
    coordinator_tls: tls.TlsIdentity
    ledger: MemoryLog
    clock: Callable[[], float]
    nodes: dict[str, Node] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)
    """The newest size of the ledger that each custodian was shown."""

    further_operators: list[LoadedKeys] = field(default_factory=list)
    keystore: type[Keystore] = Keystore
    """What nodes are opened with: a twin that dies, say."""

    secrets: dict[str, str] = field(default_factory=dict)
    """What opens a custodian's keystore, where that is another than the passphrase."""

    @property
    def log(self) -> LogSigner:
        """The keys of the log that the roster names."""
        return self.ledger.signer

    @property
    def cluster(self) -> str:
        return self.roster.cluster

    @property
    def quorum(self) -> Quorum:
        return self.roster.quorum_of()

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(custodian.id for custodian in self.roster.custodians)

    def directory(self, custodian_id: str) -> Path:
        return self.folder / custodian_id

    def open(self, custodian_id: str, *, shown: bool = True) -> Node:
        """The custodian in this process; opened when it was not, and told of the ledger as it is."""
        if custodian_id not in self.nodes:
            self.nodes[custodian_id] = open_node(
                self.directory(custodian_id),
                self.secrets.get(custodian_id, PASSPHRASE),
                clock=self.clock,
                keystore=self.keystore,
            )
            if shown and self.ledger.size:
                self.ledger.bring(self.nodes[custodian_id].witness)
                self.reached[custodian_id] = self.ledger.size
        return self.nodes[custodian_id]

    def open_all(self) -> dict[str, Node]:
        return {custodian_id: self.open(custodian_id) for custodian_id in self.ids}

    def copy(self, folder: Path, clock: Callable[[], float] | None = None) -> Committee:
        """The same custodians on disk once more, for a test that changes them; none may be open."""
        assert not self.nodes
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return dataclasses.replace(self, folder=folder, nodes={}, reached={}, clock=clock or self.clock)

    def close(self) -> None:
        """Close every node opened here, so that processes can be started on the folders."""
        for node in self.nodes.values():
            node.close()
        self.nodes.clear()

    def channel(self, custodian_id: str, address: str, identity: tls.TlsIdentity | None = None) -> grpc.aio.Channel:
        """A channel to a custodian that listens at ``address``; as the coordinator, unless ``identity`` says other."""
        certificate = self.roster.custodian(custodian_id).tls_certificate.encode()
        name = tls.dns_name(self.cluster, "custodian", custodian_id)
        return tls.open_channel(address, identity or self.coordinator_tls, [certificate], name)

    # -- ceremonies ------------------------------------------------------------------------------------------------

    def plan(
        self, key_id: str = "key-1", epoch: int = 1, suite: str = Suite.MLKEM768_X25519, **changes: object
    ) -> CeremonyPlan:
        """A plan that every custodian accepts, unless ``changes`` say otherwise."""
        members: dict[str, object] = {
            "ceremony_id": new_ceremony_id(),
            "key_id": key_id,
            "epoch": epoch,
            "suite": str(suite),
            "cluster": self.cluster,
            "roster_digest": self.roster.digest,
            "quorum": self.quorum,
            "created_at": int(self.clock()),
        }
        return CeremonyPlan(**{**members, **changes})  # type: ignore[arg-type]

    def sign_plan(self, plan: CeremonyPlan) -> bytes:
        return order(self, plan)

    @property
    def operators(self) -> list[LoadedKeys]:
        """Everyone who may sign plans and rosters."""
        return [self.operator, *self.further_operators]

    def generate(
        self, key_id: str = "key-1", suite: str = Suite.MLKEM768_X25519, policy: KeyPolicy | None = None
    ) -> bytes:
        """Run the whole *generate* ceremony among the nodes in this process; returns the certificate envelope."""
        return Make(self, self.plan(key_id, suite=suite, policy=policy or KeyPolicy())).activate()

    # -- releases --------------------------------------------------------------------------------------------------

    def manifest(self, key_id: str = "key-1", epoch: int = 1, **changes: object) -> manifest.Manifest:
        """A manifest of the owner's that every custodian accepts, unless ``changes`` say otherwise."""
        now = int(self.clock())
        members: dict[str, object] = {
            "subjects": (manifest.Subject("main.py", hashlib.sha256(b"print()").hexdigest()),),
            "key_id": key_id,
            "epoch": epoch,
            "classification": "internal",
            "export_control": "",
            "regions": ("CH",),
            "evidence_types": ("sev-snp",),
            "resources": manifest.Resources(1, 256, 0, 60, 16),
            "owner": self.owner.name,
            "owner_identity": self.owner.identity.public,
            "owner_hpke": self.owner.recipient.public,
            "entrypoint": ("python", "main.py"),
            "not_before": now - 60,
            "not_after": now + 3600,
            "issued_at": now,
            "nonce": secrets.token_hex(16),
        }
        return manifest.Manifest(**{**members, **changes})  # type: ignore[arg-type]

    def owner_request(self, envelope: bytes | None = None, **leaf: object) -> ReleaseRequest:
        """The owner asks; ``leaf`` replaces members of the leaf."""
        envelope = envelope or manifest.sign_manifest(self.manifest(), self.owner.identity)
        return self.logged(ReleaseRequest(envelope, b"", self.leaf(envelope, b"", **leaf).to_bytes()))

    def worker_request(
        self, evidence: bytes, envelope: bytes | None = None, worker: Identity | None = None, **leaf: object
    ) -> ReleaseRequest:
        """A worker asks, on an evidence document; ``worker`` signs that it hands it in."""
        envelope = envelope or manifest.sign_manifest(self.manifest(), self.owner.identity)
        said = self.leaf(envelope, evidence, **leaf)
        presentation = sign_presentation(worker, said.job_id, said.evidence_sha256) if worker is not None else b""
        return self.logged(ReleaseRequest(envelope, evidence, said.to_bytes(), presentation=presentation))

    def logged(self, request: ReleaseRequest) -> ReleaseRequest:
        """The request with its leaf in the ledger, whose newest checkpoint all nodes open here have then seen."""
        inclusion = self.ledger.append(request.leaf)
        self.ledger.bring(*(node.witness for node in self.nodes.values()))
        self.reached |= dict.fromkeys(self.nodes, self.ledger.size)
        return dataclasses.replace(request, inclusion=inclusion)

    def message(self, to: str, request: ReleaseRequest, request_id: str = "r") -> pb.ReleaseRequest:
        """The request as it goes over the wire to one custodian, with the checkpoint it may not have seen."""
        others = [name for name in self.ledger.witnesses if name != to]  # it cosigns nothing that it was not shown
        update = self.ledger.update(self.reached.get(to, 0), cosigned=self.ledger.cosigned(by=others))
        self.reached[to] = self.ledger.size
        return pb.ReleaseRequest(
            request_id=request_id,
            manifest=request.manifest,
            evidence=request.evidence,
            presentation=request.presentation,
            leaf=request.leaf,
            leaf_index=request.inclusion.index,
            tree_size=request.inclusion.size,
            inclusion_proof=request.inclusion.proof,
            update=update_message(update),
        )

    def leaf(self, envelope: bytes, evidence: bytes, **changes: object) -> Leaf:
        """The leaf that fits a manifest envelope and an evidence document (empty: the owner asks)."""
        opened, payload = manifest.open_manifest(envelope, self.owner.identity.public)
        recipient = base64.b64decode(json.loads(evidence)["hpke_key"]) if evidence else opened.owner_hpke
        members: dict[str, object] = {
            "job_id": manifest.job_id(payload),
            "manifest_sha256": manifest.subject(payload).hex(),
            "recipient_sha256": hashlib.sha256(recipient).hexdigest(),
            "evidence_sha256": hashlib.sha256(evidence).hexdigest(),
            "key_id": opened.key_id,
            "epoch": opened.epoch,
            "time": int(self.clock()),
            "recipient": "worker" if evidence else "owner",
            "development": bool(evidence),
        }
        return Leaf(**{**members, **changes})  # type: ignore[arg-type]

    def evidence(
        self,
        recipient: RecipientKey,
        signing: Identity,
        *,
        nodes: Iterable[str] | None = None,
        chip: DevelopmentChip | None = None,
        measurement: bytes = MEASUREMENT,
        **report: object,
    ) -> bytes:
        """Development evidence bound to the worker's two keys and the present nonces of the nodes open here."""
        nonces = {}
        for name in nodes if nodes is not None else self.nodes:
            windows = self.nodes[name].windows
            nonces[name] = (windows.number(), windows.current_nonces()[windows.number()])
        return evidence_document(
            nonces,
            hpke_key=recipient.public,
            signing_key=signing.public.to_bytes(),
            chip=chip,
            measurement=measurement,
            **report,
        )


def build_committee(
    folder: Path,
    custodians: Iterable[tuple[str, str]] = THREE,
    rule: Mapping[str, object] = TWO_OF_THREE,
    *,
    cluster: str = "demo",
    clock: Callable[[], float] = time.time,
    owner_name: str = "alice",
    reference: Mapping[str, object] | None = None,
    inventory: Mapping[str, object] | None = None,
    quota: int = 1000,
    metrics: bool = False,
    with_log: bool = True,
) -> Committee:
    """Make the folders of ``custodians`` ((id, jurisdiction) pairs) under ``folder``, ready to be served.

    Beside them: ``roster.json``, ``operators.json``, ``coordinator-{cert,key}.pem``, and the key files of the owner and
    of the operator ``olga`` under :data:`PASSPHRASE`. Ports are free ones on 127.0.0.1.
    """
    now = int(clock())
    folder.mkdir(exist_ok=True, parents=True)
    operator, owner = save_keys(folder, "olga", "operator"), save_keys(folder, owner_name, "owner")
    coordinator = tls.self_signed(cluster, "coordinator", "main", now=now)
    (folder / "coordinator-cert.pem").write_bytes(coordinator.certificate)
    (folder / "coordinator-key.pem").write_bytes(coordinator.key)
    made = [
        _make_custodian(folder, custodian_id, jurisdiction, cluster, now, quota=quota, metrics=metrics)
        for custodian_id, jurisdiction in custodians
    ]
    entries = [entry for entry, _ in made]
    cosigners = {entry.id: cosigner for entry, cosigner in made}
    log = LogSigner.generate(f"{cluster}/ledger")
    roster = Roster(
        cluster=cluster,
        version=1,
        issued_at=now - 60,
        expires_at=now + 365 * _DAY,
        committee="main",
        custodians=tuple(entries),
        quorum=rule,
        operators=(Operator(operator.name, operator.identity.public),),
        operator_threshold=1,
        coordinator_tls=(coordinator.certificate.decode(),),
        log_key=log.keys if with_log else None,
    )
    envelope = sign_roster(roster, [operator.identity])
    operators = {operator.name: base64.b64encode(operator.identity.public.to_bytes()).decode()}
    owner_file = {"name": owner.name, "identity": base64.b64encode(owner.identity.public.to_bytes()).decode()}
    (folder / "owner.json").write_text(json.dumps(owner_file))
    (folder / "policy.json").write_bytes(
        policies.bundle(
            [operator.identity], custodians=[entry.id for entry in entries], cluster=cluster, issued_at=now - 60
        )
    )
    for kind, body in (
        ("reference-values", reference or reference_json()),
        ("inventory", inventory or inventory_json()),
    ):
        document = sign_bulletin(bulletin(kind, body, cluster=cluster), [operator.identity])
        (folder / f"{kind}.json").write_bytes(document)
    (folder / "operators.json").write_text(json.dumps({"threshold": 1, "operators": operators}))
    (folder / "roster.json").write_bytes(envelope)
    for entry in entries:
        equip(folder, entry.id, owner.name)
    return Committee(folder, roster, envelope, operator, owner, coordinator, MemoryLog(log, clock, cosigners), clock)


def _make_custodian(
    folder: Path, custodian_id: str, jurisdiction: str, cluster: str, now: int, *, quota: int, metrics: bool
) -> tuple[RosterCustodian, Cosigner]:
    config = CustodianConfig(
        directory=folder / custodian_id,
        id=custodian_id,
        jurisdiction=jurisdiction,
        cluster=cluster,
        listen="127.0.0.1:0",
        admin_listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0" if metrics else "",
        releases_per_owner_per_hour=quota,
        shutdown_grace=2,
    )
    entry = initialise(config, PASSPHRASE, now=now, opslimit=_OPSLIMIT, memlimit=_MEMLIMIT).custodian
    store = Keystore.open(config.keystore, PASSPHRASE)
    cosigner = store.cosigner(entry.witness_key.name)
    store.close()
    return entry, cosigner


def equip(folder: Path, custodian_id: str, owner: str) -> None:
    """What a custodian's operator puts beside it, copied from ``folder``."""
    for name in ("roster.json", "operators.json"):
        (folder / custodian_id / name).write_bytes((folder / name).read_bytes())
    for name in ("policy.json", "reference-values.json", "inventory.json"):
        (folder / custodian_id / "bulletins" / name).write_bytes((folder / name).read_bytes())
    (folder / custodian_id / "owners" / f"{owner}.json").write_bytes((folder / "owner.json").read_bytes())


def new_roster(
    committee: Committee,
    *,
    replace: str = "",
    add: tuple[str, str] | None = None,
    remove: str = "",
    rule: Mapping[str, object] | None = None,
) -> None:
    """The next version of the roster, in everybody's folder, with a new custodian in the place of ``replace``, with one
    more, one less, or another rule. Custodians open in this process must be closed before."""
    old, now = committee.roster, int(committee.clock())
    entries = {custodian.id: custodian for custodian in old.custodians if custodian.id != remove}
    fresh = [(replace, entries[replace].jurisdiction)] if replace else [add] if add else []
    for custodian_id, jurisdiction in fresh:
        entries[custodian_id], cosigner = _make_custodian(
            committee.folder, custodian_id, jurisdiction, old.cluster, now, quota=1000, metrics=False
        )
        committee.ledger.witnesses[custodian_id] = cosigner
    committee.roster = dataclasses.replace(
        old,
        version=old.version + 1,
        previous=old.digest,
        issued_at=now - 60,
        custodians=tuple(entries.values()),
        quorum=rule or old.quorum,
    )
    committee.roster_envelope = sign_roster(committee.roster, [each.identity for each in committee.operators])
    (committee.folder / "roster.json").write_bytes(committee.roster_envelope)
    for custodian_id in entries:
        equip(committee.folder, custodian_id, committee.owner.name)


@dataclass
class CustodianProcess:
    """A real ``keyquorum-custodian serve``. ``address`` is where coordinators reach it; its log is at ``log``."""

    process: subprocess.Popen[bytes]
    address: str
    admin_address: str
    metrics_address: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, timeout: float = 15) -> int:
        """SIGTERM, and wait; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        finally:
            self._close()

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._close()

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


def start_custodian_process(
    directory: Path, passphrase: str = PASSPHRASE, *, timeout: float = 30, arguments: Iterable[str] = ()
) -> CustodianProcess:
    """Start a custodian and wait until it says that it is ready. Raises :class:`RuntimeError` with its log."""
    log = directory.parent / f"{directory.name}.log"
    environment = {**os.environ, "KEYQUORUM_PASSPHRASE": passphrase}
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "keyquorum_custodian", "serve", "--dir", str(directory), *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], timeout)
    line = process.stdout.readline() if readable else b""
    if not line:
        process.kill()
        process.wait(10)
        process.stdout.close()
        raise RuntimeError(f"custodian {directory.name} did not start:\n{log.read_text()[-4000:]}")
    ready = json.loads(line)
    return CustodianProcess(process, ready["address"], ready["admin"], ready["metrics"], log)
