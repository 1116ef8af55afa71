"""coordinator.toml, the files beside it, and what a coordinator trusts: read strictly, before anything listens.

An unknown member is refused, so that a misspelt limit is never silently a missing one. Paths are relative to the
file's folder.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from keyquorum_core import names
from keyquorum_core.drill_report import FULL, KINDS
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.roster import Roster, open_roster, parse_operators
from keyquorum_core.strictjson import Fields
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.ports import parse_address
from keyquorum_protos.wire.tls import TlsIdentity

__all__ = ["CONFIG_NAME", "CoordinatorConfig", "DrillSettings", "Trust", "load_config", "load_trust", "render_config"]

CONFIG_NAME = "coordinator.toml"
_CLASSIFICATION = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_SPAN = re.compile(r"([1-9][0-9]{0,5})([mhd])", re.ASCII)
_SHORTEST_SCHEDULE = 600
_LONGEST_SCHEDULE = 366 * 86400


@dataclass(frozen=True, slots=True)
class DrillSettings:
    """The table ``[drills]``. ``key``: the canary that scheduled drills are about, and others where none is named;
    ``classification``: of the probes, for policies; ``schedule``: seconds from one drill of a kind to the next."""

    key: str = ""
    classification: str = "public"
    schedule: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """Durations in seconds. ``metrics_listen`` and ``ledger_listen`` are empty when nothing is served there.
    ``database``, ``ledger_database`` and ``ledger_checkpoint`` are SQLAlchemy URLs or SQLite files' paths; ``store``
    and ``ledger_tiles`` object stores' URLs or folders' paths. ``ledger_batch_ms``: milliseconds for which the ledger
    waits for more leaves before it commits; at 0 a batch is what came during the commit before it. ``policy_signers``:
    a file of the form of ``operators``, saying whose signatures count on the coordinator's policies and lists.
    ``cosign_interval``: how often custodians cosign a ledger that stands still."""

    directory: Path
    name: str
    cluster: str
    listen: str
    metrics_listen: str
    database: str = "coordinator.db"
    store: str = "artifacts"
    roster: str = "roster.json"
    operators: str = "operators.json"
    bulletins: str = "bulletins"
    policy_signers: str = "operators.json"
    tls_certificate: str = "tls-cert.pem"
    tls_key: str = "tls-key.pem"
    clients_ca: str = "clients-ca.pem"
    clients_ca_key: str = "clients-ca-key.pem"
    log_key: str = "log-key.json"
    ledger_database: str = "ledger.db"
    ledger_checkpoint: str = "ledger-checkpoint.db"
    ledger_tiles: str = "ledger"
    ledger_listen: str = ""
    ledger_tls_certificate: str = ""
    ledger_tls_key: str = ""
    ledger_batch_ms: int = 0
    cosign_interval: int = 60
    worker_timeout: int = 30
    release_deadline: int = 10
    max_releases: int = 256
    max_open_jobs_per_owner: int = 256
    max_artifact_mib: int = 65536
    shutdown_grace: int = 10
    drills: DrillSettings = field(default_factory=DrillSettings)

    def path(self, name: str) -> Path:
        return self.directory / name

    @property
    def database_url(self) -> str:
        return self._url(self.database)

    @property
    def ledger_database_url(self) -> str:
        return self._url(self.ledger_database)

    @property
    def ledger_checkpoint_url(self) -> str:
        return self._url(self.ledger_checkpoint)

    @property
    def ledger_tls(self) -> tuple[Path, Path] | tuple[()]:
        """Certificate and key for the ledger's readers; nothing where it is served in the clear."""
        if not self.ledger_tls_certificate:
            return ()
        return self.path(self.ledger_tls_certificate), self.path(self.ledger_tls_key)

    @property
    def store_place(self) -> str:
        return self._place(self.store)

    @property
    def ledger_tiles_place(self) -> str:
        return self._place(self.ledger_tiles)

    def _url(self, database: str) -> str:
        return database if "://" in database else f"sqlite:///{self.path(database)}"

    def _place(self, store: str) -> str:
        return store if "://" in store else str(self.path(store))


@dataclass(frozen=True, slots=True)
class Trust:
    """``roster_envelope``: the exact bytes that callers compare with the ones they pinned."""

    roster: Roster
    roster_envelope: bytes
    tls: TlsIdentity
    clients_ca: bytes


_TEXTS = (
    "database",
    "store",
    "roster",
    "operators",
    "bulletins",
    "policy_signers",
    "tls_certificate",
    "tls_key",
    "clients_ca",
    "clients_ca_key",
    "log_key",
    "ledger_database",
    "ledger_checkpoint",
    "ledger_tiles",
)
_LEDGER_TLS = ("ledger_tls_certificate", "ledger_tls_key")
_LIMITS = (
    ("worker_timeout", 2, 3600),
    ("release_deadline", 1, 120),
    ("max_releases", 1, 65536),
    ("max_open_jobs_per_owner", 1, 10**6),
    ("max_artifact_mib", 1, 1 << 24),
    ("shutdown_grace", 0, 600),
    ("ledger_batch_ms", 0, 10_000),
    ("cosign_interval", 1, 3600),
)


def load_config(directory: Path) -> CoordinatorConfig:
    """Read ``directory``/coordinator.toml. Raises ``NOT_FOUND`` or :class:`MalformedError`."""
    data = read_bytes(directory / CONFIG_NAME, "the coordinator's configuration", 64 << 10)
    try:
        parsed = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MalformedError(Reason.MALFORMED, f"{CONFIG_NAME} is not TOML", actual=error) from None
    fields = Fields(parsed, CONFIG_NAME)
    name, cluster = fields.text("name", max_length=64), fields.text("cluster", max_length=64)
    check_names(name, cluster)
    listen = fields.text("listen", max_length=300)
    parse_address(listen, f"{CONFIG_NAME}: listen")
    metrics, ledger = _optional_address(fields, "metrics_listen"), _optional_address(fields, "ledger_listen")
    pair = {
        name: fields.text(name, max_length=4096, allow_empty=True) if name in fields else "" for name in _LEDGER_TLS
    }
    if len({bool(text) for text in pair.values()}) != 1:
        raise MalformedError(
            Reason.MALFORMED, f"{CONFIG_NAME}: half a TLS identity", expected=f"both of {' and '.join(_LEDGER_TLS)}"
        )
    texts = {name: fields.text(name, max_length=4096) for name in _TEXTS if name in fields}
    limits = {name: fields.integer(name, low, high) for name, low, high in _LIMITS if name in fields}
    drills = _drills(fields.object("drills")) if "drills" in fields else DrillSettings()
    fields.done()
    texts |= {"ledger_listen": ledger, **pair}
    return CoordinatorConfig(directory.absolute(), name, cluster, listen, metrics, drills=drills, **texts, **limits)  # type: ignore[arg-type]


def _drills(fields: Fields) -> DrillSettings:
    key = fields.text("key", max_length=64) if "key" in fields else ""
    if key:
        names.check(names.KEY_ID, key, "key id")
    classification = fields.text("classification", max_length=32) if "classification" in fields else "public"
    names.check(_CLASSIFICATION, classification, "classification")
    schedule: dict[str, int] = {}
    if "schedule" in fields:
        table = fields.object("schedule")
        for kind in table.names():
            if kind not in (*KINDS, FULL):
                raise MalformedError(
                    Reason.MALFORMED,
                    f"{CONFIG_NAME}: no such kind of drill",
                    expected=", ".join((*KINDS, FULL)),
                    actual=ascii(kind[:40]),
                )
            schedule[kind] = _every(table.text(kind, max_length=16), kind)
        table.done()
    fields.done()
    if "revocation" in schedule:
        raise MalformedError(
            Reason.MALFORMED,
            f"{CONFIG_NAME}: a drill of kind revocation cannot be scheduled: operators sign each one's two documents",
            expected="rotation, full or any other kind",
            actual="revocation",
            next_step="Take it out of [drills.schedule], and run it by hand: keyquorum drill run revocation",
        )
    if schedule and not key:
        raise MalformedError(Reason.MALFORMED, f"{CONFIG_NAME}: scheduled drills need a key", expected="drills.key")
    return DrillSettings(key, classification, schedule)


def _every(text: str, kind: str) -> int:
    found = _SPAN.fullmatch(text)
    seconds = int(found[1]) * {"m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0
    if not _SHORTEST_SCHEDULE <= seconds <= _LONGEST_SCHEDULE:
        raise MalformedError(
            Reason.MALFORMED,
            f"{CONFIG_NAME}: how often is a drill of kind {kind} to run?",
            expected="10m … 366d, as in 12h or 7d",
            actual=ascii(text),
        )
    return seconds


def _optional_address(fields: Fields, name: str) -> str:
    text = fields.text(name, max_length=300, allow_empty=True) if name in fields else ""
    if text:
        parse_address(text, f"{CONFIG_NAME}: {name}")
    return text


def check_names(name: str, cluster: str) -> None:
    """Raises :class:`MalformedError` unless both can stand in certificates."""
    names.check(names.PRINCIPAL, name, "coordinator name")
    names.check(names.CLUSTER, cluster, "cluster name")


def render_config(config: CoordinatorConfig) -> str:
    """The file that :func:`load_config` reads; everything in it was checked, so nothing needs escaping."""
    return (
        "# A keyquorum coordinator. It holds no key to any job. What it must keep is its databases, its artifacts,\n"
        "# the ledger's key and tiles, and before all the ledger's latest checkpoint.\n"
        f'name = "{config.name}"\n'
        f'cluster = "{config.cluster}"\n'
        f'listen = "{config.listen}"\n'
        f'metrics_listen = "{config.metrics_listen}"\n'
        f'database = "{config.database}"\n'
        f'store = "{config.store}"\n'
        f'roster = "{config.roster}"\n'
        f'operators = "{config.operators}"\n'
        f'bulletins = "{config.bulletins}"\n'
        f'policy_signers = "{config.policy_signers}"\n'
        f'tls_certificate = "{config.tls_certificate}"\n'
        f'tls_key = "{config.tls_key}"\n'
        f'clients_ca = "{config.clients_ca}"\n'
        f'clients_ca_key = "{config.clients_ca_key}"\n'
        f'log_key = "{config.log_key}"\n'
        f'ledger_listen = "{config.ledger_listen}"\n'
        f'ledger_database = "{config.ledger_database}"\n'
        f'ledger_checkpoint = "{config.ledger_checkpoint}"\n'
        f'ledger_tiles = "{config.ledger_tiles}"\n'
        f"worker_timeout = {config.worker_timeout}\n"
        f"max_open_jobs_per_owner = {config.max_open_jobs_per_owner}\n"
    )


def load_trust(config: CoordinatorConfig, now: int) -> Trust:
    """The roster, verified against the pinned operators, and the TLS identity that it must name.

    Raises ``NOT_FOUND``, :class:`MalformedError`, and as :func:`open_roster`.
    """
    operators, threshold = parse_operators(read_bytes(config.path(config.operators), "operators file"))
    envelope = read_bytes(config.path(config.roster), "the roster")
    roster = open_roster(envelope, operators, threshold, now, cluster=config.cluster)
    tls = TlsIdentity(
        read_bytes(config.path(config.tls_certificate), "the coordinator's TLS certificate", 64 << 10),
        read_bytes(config.path(config.tls_key), "the coordinator's TLS key", 64 << 10),
    )
    if tls.certificate.decode("ascii", "replace") not in roster.coordinator_tls:
        raise RefusedError(
            Reason.ROSTER,
            "the roster does not name this coordinator's TLS certificate",
            expected=f"one of the {len(roster.coordinator_tls)} coordinator certificates in the roster",
            actual=str(config.path(config.tls_certificate)),
            next_step="Have the operators sign a roster with this certificate, or use the one it names",
        )
    return Trust(roster, envelope, tls, read_bytes(config.path(config.clients_ca), "the callers' authority", 64 << 10))
