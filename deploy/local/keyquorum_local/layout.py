"""What the local cluster looks like on disk and on the network, and the one-time set-up that makes it.

Set-up does what operators would do by hand (docs/operators.md): every role's ``init``, the enrolment cards brought
together into a roster that an operator signs, and the roster, the owners and the reference values handed to everyone.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from keyquorum.keyfiles import create_keys
from keyquorum.policies import load_source, sign_policy
from keyquorum_core.attestation.development import DEVELOPMENT_TCB, DevelopmentChip, DevelopmentVendor
from keyquorum_core.bulletin import Bulletin, sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.keywrap import load_keys
from keyquorum_core.ledger.log_keys import LogKeys
from keyquorum_core.roster import Operator, Roster, open_card, sign_roster
from keyquorum_core.signing import Identity
from keyquorum_custodian.trust import add_owner
from keyquorum_protos.wire.ports import choose_port
from keyquorum_protos.wire.tls import CertificateAuthority, TlsIdentity

__all__ = ["CUSTODIANS", "QUORUM", "Layout", "create", "open_layout", "program"]

CUSTODIANS: tuple[tuple[str, str], ...] = (
    ("ch-1", "CH"),
    ("ch-2", "CH"),
    ("de-1", "DE"),
    ("is-1", "IS"),
    ("jp-1", "JP"),
)
QUORUM: Mapping[str, object] = {"at_least": 3, "jurisdictions": 2}
MEASUREMENT = "6b65797175" + "00" * 43  # the development platform's launch measurement: "keyqu", then zeros
REGION = "eu"
CONTROLS = "research-open"
WORKER = "gpu-1"
CLUSTER = "local"
_MARKER = "cluster.json"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths and names of one local cluster."""

    root: Path
    custodians: tuple[tuple[str, str], ...] = field(default=CUSTODIANS)

    @property
    def profile(self) -> Path:
        return self.root / "profile.toml"

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    @property
    def worker(self) -> Path:
        return self.root / "worker"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def owner_passphrase(self) -> Path:
        return self.root / "owner.passphrase"

    def custodian(self, name: str) -> Path:
        return self.root / "custodians" / name

    def passphrase(self, name: str) -> Path:
        return self.custodian(name) / "passphrase"

    @property
    def exists(self) -> bool:
        return (self.root / _MARKER).is_file()


def create(
    root: Path,
    *,
    custodians: Sequence[tuple[str, str]] = CUSTODIANS,
    quorum: Mapping[str, object] = QUORUM,
    step: Callable[[str], None] = lambda text: None,
) -> Layout:
    """Set a cluster up below ``root``, which must be empty or absent. ``step`` is told what is being done.

    Raises :class:`StateError` (``EXISTS``) rather than touch what is there.
    """
    layout = Layout(root.absolute(), tuple(custodians))
    if root.exists() and any(root.iterdir()):
        raise StateError(
            Reason.EXISTS, f"{root} is not empty", next_step="Name an empty folder, or one that `up` made before"
        )
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    layout.logs.mkdir(mode=0o700)
    now = int(time.time())
    ports = _choose_ports(3 * len(layout.custodians) + 3)
    coordinator = ports[-3:]
    step(f"{len(layout.custodians)} custodians make their identities and keystores")
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        jobs = [
            pool.submit(_init_custodian, layout, name, jurisdiction, ports[3 * i : 3 * i + 3])
            for i, (name, jurisdiction) in enumerate(layout.custodians)
        ]
        vendor = pool.submit(DevelopmentVendor.create, now=now)
        jobs.append(pool.submit(_init_coordinator, layout, coordinator))
        for job in jobs:
            job.result()
    step("an operator signs the roster")
    roster_digest, operator = _sign_roster(layout, quorum, f"http://127.0.0.1:{coordinator[2]}", now)
    step("the development vendor makes a chip; the operator signs what custodians accept")
    _hand_out(layout, vendor.result(), operator, now)
    _write_profile(layout, roster_digest, coordinator[0])
    _configure_worker(layout, WORKER, coordinator[0])
    marker = {"custodians": [list(each) for each in layout.custodians], "version": 1}
    _write(root / _MARKER, json.dumps(marker).encode())
    return layout


def _choose_ports(count: int) -> list[int]:
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen[choose_port()] = None
    return list(chosen)


def open_layout(root: Path) -> Layout:
    """A cluster that :func:`create` made. Raises :class:`StateError` (``NOT_FOUND``)."""
    marker = root / _MARKER
    if not marker.is_file():
        raise StateError(Reason.NOT_FOUND, f"there is no local cluster in {root}", expected=f"a file {marker}")
    parsed = json.loads(marker.read_text())
    return Layout(root.absolute(), tuple((str(name), str(where)) for name, where in parsed["custodians"]))


def program(name: str) -> list[str]:
    """The command line of a console script of this environment."""
    script = Path(sys.executable).parent / name
    found = str(script) if script.is_file() else shutil.which(name)
    if found is None:
        raise StateError(
            Reason.NOT_FOUND, f"the program {name} is not installed", next_step=f"Install {name} beside keyquorum-local"
        )
    return [found]


def _run(arguments: list[str], passphrase: str | None = None) -> None:
    environment = dict(os.environ)
    if passphrase is not None:
        environment["KEYQUORUM_PASSPHRASE"] = passphrase
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KeyquorumError(
            Reason.INTERNAL, f"{Path(arguments[0]).name} {arguments[1]} failed", actual=done.stderr.strip()[-2000:]
        )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _init_custodian(layout: Layout, name: str, jurisdiction: str, ports: Sequence[int]) -> None:
    passphrase = secrets.token_urlsafe(24)
    where = layout.custodian(name)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    _run(
        [
            *program("keyquorum-custodian"), "init", "--dir", str(where), "--id", name, "--jurisdiction", jurisdiction,
            "--cluster", CLUSTER, "--listen", addresses[0], "--admin-listen", addresses[1],
            "--metrics-listen", addresses[2],
        ],
        passphrase,
    )  # fmt: skip
    _write(layout.passphrase(name), passphrase.encode())


def _init_coordinator(layout: Layout, ports: Sequence[int]) -> None:
    _run(
        [
            *program("keyquorum-coordinator"), "init", "--dir", str(layout.coordinator), "--cluster", CLUSTER,
            "--name", "main", "--listen", f"127.0.0.1:{ports[0]}", "--metrics-listen", f"127.0.0.1:{ports[1]}",
            "--ledger-listen", f"127.0.0.1:{ports[2]}",
        ]
    )  # fmt: skip


def _sign_roster(layout: Layout, quorum: Mapping[str, object], log_url: str, now: int) -> tuple[str, Identity]:
    """Operator and owner make their keys; the roster is signed and handed to everyone. Its digest in hex, and who
    signed it."""
    passphrase = secrets.token_urlsafe(24)
    _write(layout.owner_passphrase, passphrase.encode())
    for role, name in (("owner", "alice"), ("operator", "ops")):
        create_keys(layout.root, name, role, passphrase)
    operator = load_keys((layout.root / "ops.key.json").read_bytes(), passphrase)
    cards = [
        open_card((layout.custodian(name) / "card.json").read_bytes(), cluster=CLUSTER) for name, _ in layout.custodians
    ]
    roster = Roster(
        cluster=CLUSTER,
        version=1,
        issued_at=now,
        expires_at=now + 365 * 86400,
        committee="local",
        custodians=tuple(card.custodian for card in cards),
        quorum=dict(quorum),
        operators=(Operator("ops", operator.identity.public),),
        operator_threshold=1,
        coordinator_tls=((layout.coordinator / "tls-cert.pem").read_text(),),
        log_key=LogKeys.parse((layout.coordinator / "log.vkey").read_text().strip()),
        log_url=log_url,
    )
    pinned = {"ops": base64.b64encode(operator.identity.public.to_bytes()).decode()}
    operators = json.dumps({"threshold": 1, "operators": pinned}).encode()
    envelope = sign_roster(roster, [operator.identity])
    _install_policies(layout, operator.identity, now)
    for place in (layout.root, layout.coordinator, layout.worker, *(layout.custodian(n) for n, _ in layout.custodians)):
        _write(place / "roster.json", envelope)
        _write(place / "operators.json", operators)
    return roster.digest, operator.identity


def _install_policies(layout: Layout, operator: Identity, now: int) -> None:
    """Every seat decides by the controls in :data:`CONTROLS`, in a bundle of its own that the operator signs."""
    source = load_source(CONTROLS)
    for custodian in (*(name for name, _ in layout.custodians), None):
        bundle = sign_policy(
            source,
            [operator],
            cluster=CLUSTER,
            custodians=[custodian] if custodian else [],
            version=1,
            now=now,
            days=365,
        )
        place = layout.custodian(custodian) if custodian else layout.coordinator
        _write(place / "bulletins" / "policy.json", bundle)


def _reference(vendor: DevelopmentVendor, chip: DevelopmentChip) -> dict[str, object]:
    """What the custodians accept: the development platform, and nothing else."""
    image = {
        "name": "development platform",
        "measurement": MEASUREMENT,
        "host_data": ["00" * 32],
        "id_key_digests": ["00" * 48],
        "author_key_digests": ["00" * 48],
        "minimum_guest_svn": 0,
    }
    return {
        "max_evidence_age": 600,
        "sev-snp": {
            "roots": [],
            "development_roots": [vendor.root],
            "images": [image],
            "minimum_tcb": {chip.product.value: {name: DEVELOPMENT_TCB[name] for name in chip.product.layout}},
            "tcb_grace": [],
            "vmpl": [0],
            "platform_info": {"required": [], "allowed": ["SMT_EN"]},
            "revocation": "when-given",
            "max_revocation_age": 86400,
        },
    }


def _inventory(chip: DevelopmentChip) -> dict[str, object]:
    machine = {"name": WORKER, "region": REGION, "provider": "this-machine", "model": "development", "owner": "you"}
    return {"machines": [{**machine, "hardware": {"sev-snp": [chip.chip_id.hex()]}}]}


def _hand_out(layout: Layout, vendor: DevelopmentVendor, operator: Identity, now: int) -> None:
    """Certificates to the coordinator's callers; to the custodians the identities of the owner and, for canary keys
    only, of drills, and what the operator signs about hardware."""
    chip = vendor.chip(now=now)
    for name, data in chip.to_files().items():
        _write(layout.worker / "platform" / name, data)
    _write(layout.worker / "platform" / "measurement", MEASUREMENT.encode())
    documents = {
        kind: sign_bulletin(Bulletin(CLUSTER, kind, 1, now, now + 365 * 86400, body), [operator])
        for kind, body in (("reference-values", _reference(vendor, chip)), ("inventory", _inventory(chip)))
    }
    public = (layout.root / "alice.pub.json").read_bytes()
    drill = (layout.coordinator / "drill.pub.json").read_bytes()
    _write(layout.root / "drill.pub.json", drill)
    for name, _ in layout.custodians:
        where = layout.custodian(name)
        for kind, document in documents.items():
            _write(where / "bulletins" / f"{kind}.json", document)
        (where / "owners").mkdir(mode=0o700, exist_ok=True)
        add_owner(where / "owners", public)
        add_owner(where / "owners", drill, canary=True)
    authority = CertificateAuthority(
        TlsIdentity(
            (layout.coordinator / "clients-ca.pem").read_bytes(),
            (layout.coordinator / "clients-ca-key.pem").read_bytes(),
        )
    )
    callers = [("owner", "alice", layout.root), ("operator", "ops", layout.root), ("worker", WORKER, layout.worker)]
    for role, name, place in callers:
        identity = authority.issue(CLUSTER, role, name, now=now)
        _write(place / f"{name}-cert.pem", identity.certificate)
        _write(place / f"{name}-key.pem", identity.key)


def _configure_worker(layout: Layout, worker: str, port: int) -> None:
    text = (
        f'name = "{worker}"\ncluster = "{CLUSTER}"\ncoordinator = "127.0.0.1:{port}"\ncoordinator_name = "main"\n'
        'roster = "roster.json"\noperators = "operators.json"\n'
        f'tls_certificate = "{worker}-cert.pem"\ntls_key = "{worker}-key.pem"\n\n[development]\ndir = "platform"\n'
    )
    _write(layout.worker / "worker.toml", text.encode())


def _write_profile(layout: Layout, roster_digest: str, port: int) -> None:
    def person(role: str, name: str) -> str:
        return (
            f'\n[{role}]\nname = "{name}"\nkey = "{name}.key.json"\n'
            f'tls_certificate = "{name}-cert.pem"\ntls_key = "{name}-key.pem"\n'
        )

    profile = (
        "# The local cluster's profile, for owner and operator alike: fine on one machine, nowhere else.\n"
        f'cluster = "{CLUSTER}"\ncoordinator = "127.0.0.1:{port}"\ncoordinator_name = "main"\n'
        f'roster = "roster.json"\nroster_sha256 = "{roster_digest}"\noperators = "operators.json"\n'
        'state_dir = "state"\ndrill = "drill.pub.json"\n'
    )
    _write(layout.profile, (profile + person("owner", "alice") + person("operator", "ops")).encode())
