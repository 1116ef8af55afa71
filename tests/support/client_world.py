"""The client's surroundings: five custodians with real seeds and signatures, an owner, an operator, and their files.

No processes and no network: custodians answer as functions. Rule: any three of five, so four answers confirm a key.
"""

from __future__ import annotations

import base64
import functools
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum_core.ceremony import CERTIFICATE_TYPE, EpochCertificate, commitment
from keyquorum_core.ceremony_plan import CeremonyPlan, new_ceremony_id
from keyquorum_core.derivation import contributions
from keyquorum_core.key_request import peek_asked
from keyquorum_core.keywrap import save_keys
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.witness_keys import witness_name
from keyquorum_core.manifest import job_id
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.release import (
    NO_LEASE,
    Answer,
    Leaf,
    LeaseTerms,
    Window,
    encode_share,
    make_window,
    share_info,
    sign_answer,
    sign_window,
    window_of,
)
from keyquorum_core.roster import Operator, Roster, RosterCustodian, sign_roster
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.signing import Identity, peek_payload, sign_many
from keyquorum_protos.wire.tls import CertificateAuthority, TlsIdentity, self_signed

CLUSTER = "test"
COORDINATOR = "main"
PASSPHRASE = "correct horse"
COMMITTEE = (("ch-1", "CH"), ("de-1", "DE"), ("de-2", "DE"), ("fr-1", "FR"), ("is-1", "IS"))
RULE: Mapping[str, object] = {"at_least": 3}
MANIFEST_TYPE = "application/vnd.in-toto+json"


def custodian_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@dataclass
class FakeCustodian:
    """One custodian: answers anybody, honestly unless ``lies`` (wrong contributions, well signed)."""

    id: str
    identity: Identity
    recipient: RecipientKey
    cosigner: Cosigner
    seeds: dict[int, bytes] = field(default_factory=dict)
    lies: bool = False
    garbles: bool = False
    answer_key: Ed25519PrivateKey = field(default_factory=custodian_key)

    def window(self, now: float) -> Window:
        public = self.answer_key.public_key().public_bytes_raw()
        return make_window(CLUSTER, self.id, window_of(int(now)), b"boot secret of " + self.id.encode(), public)

    def window_statement(self, now: float) -> bytes:
        return sign_window(self.window(now), self.identity)

    def answer(self, manifest: bytes, leaf: Leaf, recipient_public: bytes, now: float) -> Answer:
        binding = peek_asked(manifest).binding()
        shares = contributions(self.seeds, binding.context())
        if self.lies:
            shares = {index: secrets.token_bytes(32) for index in shares}
        lease = NO_LEASE if leaf.recipient == "owner" else LeaseTerms(3600, 1800)
        plaintext = b"nonsense" if self.garbles else encode_share(shares, lease)
        sealed = seal(recipient_public, plaintext, share_info(leaf.hash(), self.id, recipient_public))
        number = window_of(int(now))
        return sign_answer(
            self.answer_key, binding.subject, leaf.hash(), self.id, binding.key_id, binding.epoch, number, sealed
        )


@dataclass
class World:
    """Everything that exists before a test begins."""

    custodians: dict[str, FakeCustodian]
    operator: Identity
    owner: Identity
    owner_recipient: RecipientKey
    coordinator_tls: TlsIdentity
    log: LogSigner
    authority: CertificateAuthority
    roster: Roster
    roster_envelope: bytes
    quorum: Quorum
    certificates: dict[str, bytes]

    def honest(self) -> World:
        """A copy whose custodians a test may corrupt."""
        return replace(self, custodians={name: replace(each) for name, each in self.custodians.items()})

    def plan(self, key_id: str, **changes: object) -> CeremonyPlan:
        values: dict[str, object] = {
            "ceremony_id": new_ceremony_id(),
            "key_id": key_id,
            "epoch": 1,
            "suite": "MLKEM768_X25519",
            "cluster": CLUSTER,
            "roster_digest": self.roster.digest,
            "quorum": self.quorum,
            "created_at": int(time.time()),
        }
        return CeremonyPlan(**(values | changes))  # type: ignore[arg-type]

    def certify(self, plan: CeremonyPlan, signers: list[str] | None = None) -> bytes:
        """An epoch certificate for fresh commitments, signed by all custodians or those named."""
        seeds = [secrets.token_bytes(32) for _ in range(plan.quorum.seed_count)]
        made = EpochCertificate(plan, tuple(commitment(plan.ceremony_id, i, seed) for i, seed in enumerate(seeds)))
        identities = [self.custodians[name].identity for name in signers or sorted(self.custodians)]
        return sign_many(identities, CERTIFICATE_TYPE, made.to_payload())

    def write_profile(self, folder: Path, address: str, *, operator: bool = True) -> Path:
        """The owner's (and operator's) profile and all files it names; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        people = {"owner": ("alice", self.owner, self.owner_recipient)}
        if operator:
            people["operator"] = ("oscar", self.operator, RecipientKey.generate())
        text = (
            f'cluster = "{CLUSTER}"\ncoordinator = "{address}"\ncoordinator_name = "{COORDINATOR}"\n'
            f'roster = "roster.json"\nroster_sha256 = "{self.roster.digest}"\n'
            'operators = "operators.json"\nstate_dir = "state"\n'
        )
        for role, (name, identity, recipient) in people.items():
            blob = save_keys(identity, recipient, PASSPHRASE, role, name, opslimit=1, memlimit=8192)
            (folder / f"{name}.key.json").write_bytes(blob)
            tls = self.authority.issue(CLUSTER, role, name, now=int(time.time()))
            (folder / f"{name}-cert.pem").write_bytes(tls.certificate)
            (folder / f"{name}-key.pem").write_bytes(tls.key)
            text += (
                f'\n[{role}]\nname = "{name}"\nkey = "{name}.key.json"\n'
                f'tls_certificate = "{name}-cert.pem"\ntls_key = "{name}-key.pem"\n'
            )
        (folder / "roster.json").write_bytes(self.roster_envelope)
        operators = {"oscar": base64.b64encode(self.operator.public.to_bytes()).decode()}
        (folder / "operators.json").write_text(json.dumps({"threshold": 1, "operators": operators}))
        (folder / "profile.toml").write_text(text)
        return folder / "profile.toml"


@functools.cache
def the_world() -> World:
    """Made once per run: tests that corrupt custodians take :meth:`World.honest`."""
    now = int(time.time())
    quorum = Quorum(RULE, (Custodian(name, where) for name, where in COMMITTEE))
    seeds = [secrets.token_bytes(32) for _ in range(quorum.seed_count)]
    custodians = {
        name: FakeCustodian(
            name,
            Identity.generate(),
            RecipientKey.generate(),
            Cosigner.generate(witness_name(CLUSTER, name)),
            {index: seeds[index] for index in quorum.indices_of(name)},
        )
        for name, _ in COMMITTEE
    }
    operator = Identity.generate()
    log = LogSigner.generate(f"{CLUSTER}/ledger")
    coordinator = self_signed(CLUSTER, "coordinator", COORDINATOR, now=now)
    roster = make_roster(custodians, operator, coordinator, log, now)
    world = World(
        custodians=custodians,
        operator=operator,
        owner=Identity.generate(),
        owner_recipient=RecipientKey.generate(),
        coordinator_tls=coordinator,
        log=log,
        authority=CertificateAuthority.create(CLUSTER, now=now),
        roster=roster,
        roster_envelope=sign_roster(roster, [operator]),
        quorum=quorum,
        certificates={},
    )
    world.certificates["demo"] = world.certify(world.plan("demo"))
    return world


def make_roster(
    custodians: Mapping[str, FakeCustodian], operator: Identity, coordinator: TlsIdentity, log: LogSigner, now: int
) -> Roster:
    where = dict(COMMITTEE)
    return Roster(
        cluster=CLUSTER,
        version=1,
        issued_at=now - 60,
        expires_at=now + 86400,
        committee="main",
        custodians=tuple(
            RosterCustodian(
                name,
                where[name],
                f"127.0.0.1:{4000 + number}",
                each.identity.public,
                each.recipient.public,
                self_signed(CLUSTER, "custodian", name, now=now).certificate.decode(),
                each.cosigner.witness_key,
            )
            for number, (name, each) in enumerate(custodians.items())
        ),
        quorum=RULE,
        operators=(Operator("oscar", operator.public),),
        operator_threshold=1,
        coordinator_tls=(coordinator.certificate.decode(),),
        log_key=log.keys,
    )


def job_folder(folder: Path, files: Mapping[str, bytes] | None = None) -> Path:
    """A small job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").write_text(
        'entrypoint = ["python", "main.py"]\nclassification = "research"\nregions = ["eu"]\n'
        "[resources]\noutput_mib = 4\n"
    )
    for name, data in (files or {"main.py": b"print('hello')\n", "data/input.bin": bytes(range(256))}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def id_of(manifest: bytes) -> str:
    return job_id(peek_payload(manifest, MANIFEST_TYPE, "manifest"))
