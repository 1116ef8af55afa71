"""custodian.toml: what a custodian is called, where it listens, whom its own operator trusts, what it allows.

Read strictly: an unknown member is refused, so that a misspelt limit is never silently a missing limit. Paths are
relative to the file's folder.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from keyquorum_core import names
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.quorum import Custodian
from keyquorum_core.strictjson import Fields
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.ports import parse_address

__all__ = ["AUTOMATIC", "CONFIG_NAME", "CustodianConfig", "load_config", "parse_config", "render_config"]

CONFIG_NAME = "custodian.toml"
AUTOMATIC = ("generate", "rotate", "repair", "retire")
"""What ``auto_approve`` may name: the routine. Everything else always waits for this custodian's operator."""


@dataclass(frozen=True, slots=True)
class CustodianConfig:
    """Durations in seconds. ``metrics_listen`` and ``witness_listen`` are empty when those are not served.
    ``bulletin_threshold``: how many operators must sign a bulletin, where the roster asks for fewer.
    ``max_cosignature_age``: for how long a quorum's cosignatures vouch for the ledger.
    ``policy_signers``: a file of the form of ``operators``, saying whose signatures count on this custodian's policies
    and lists. ``auto_approve``: the ceremonies that its operator need not be asked about. ``pkcs11_module``: the
    library of the token that seals the keystore, an absolute path; empty for none."""

    directory: Path
    id: str
    jurisdiction: str
    cluster: str
    listen: str
    admin_listen: str
    metrics_listen: str
    witness_listen: str = ""
    roster: str = "roster.json"
    operators: str = "operators.json"
    owners: str = "owners"
    bulletins: str = "bulletins"
    policy_signers: str = "operators.json"
    rosters: str = "rosters"
    bulletin_threshold: int = 1
    auto_approve: tuple[str, ...] = AUTOMATIC
    releases_per_owner_per_hour: int = 1000
    max_cosignature_age: int = 600
    shutdown_grace: int = 10
    pkcs11_module: str = ""

    def path(self, name: str) -> Path:
        """A file of the custodian's folder."""
        return self.directory / name

    @property
    def keystore(self) -> Path:
        return self.directory / "keystore.db"


def check_names(custodian_id: str, jurisdiction: str, cluster: str) -> None:
    """Raises :class:`MalformedError` unless all three can stand in certificates and rosters."""
    Custodian(custodian_id, jurisdiction)
    names.check(names.CLUSTER, cluster, "cluster name")


def check_module(path: str) -> str:
    """Raises :class:`MalformedError` unless it can stand in custodian.toml as the path of a library, or as none."""
    if path and (not Path(path).is_absolute() or not path.isprintable() or set(path) & set('"\\')):
        raise MalformedError(
            Reason.MALFORMED,
            f"{CONFIG_NAME}: pkcs11_module is no path of a library",
            expected="an absolute path without quotes, as /usr/lib/softhsm/libsofthsm2.so",
            actual=ascii(path[:200]),
        )
    return path


def load_config(directory: Path) -> CustodianConfig:
    """Read ``directory``/custodian.toml. Raises ``NOT_FOUND`` or :class:`MalformedError`."""
    return parse_config(read_bytes(directory / CONFIG_NAME, "the custodian's configuration", 64 << 10), directory)


def parse_config(data: bytes, directory: Path) -> CustodianConfig:
    """What a custodian.toml of ``directory`` says. Raises :class:`MalformedError`."""
    try:
        parsed = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MalformedError(Reason.MALFORMED, f"{CONFIG_NAME} is not TOML", actual=error) from None
    fields = Fields(parsed, CONFIG_NAME)
    texts = {name: fields.text(name, max_length=64) for name in ("id", "jurisdiction", "cluster")}
    check_names(texts["id"], texts["jurisdiction"], texts["cluster"])
    for name in ("listen", "admin_listen", "metrics_listen"):
        texts[name] = fields.text(name, max_length=300, allow_empty=name == "metrics_listen")
    if "witness_listen" in fields:
        texts["witness_listen"] = fields.text("witness_listen", max_length=300, allow_empty=True)
    for name in ("listen", "admin_listen", "metrics_listen", "witness_listen"):
        if texts.get(name):
            parse_address(texts[name], f"{CONFIG_NAME}: {name}")
    for name in ("roster", "operators", "owners", "bulletins", "policy_signers", "rosters"):
        if name in fields:
            texts[name] = fields.text(name, max_length=4096)
    if "pkcs11_module" in fields:
        texts["pkcs11_module"] = check_module(fields.text("pkcs11_module", max_length=4096, allow_empty=True))
    limits: dict[str, int] = {}
    for name, low, high in (
        ("bulletin_threshold", 1, 64),
        ("releases_per_owner_per_hour", 1, 10**9),
        ("max_cosignature_age", 30, 86400),
        ("shutdown_grace", 0, 600),
    ):
        if name in fields:
            limits[name] = fields.integer(name, low, high)
    automatic: tuple[str, ...] = AUTOMATIC
    if "auto_approve" in fields:
        automatic = fields.texts("auto_approve", max_items=len(AUTOMATIC), max_length=16)
        if not set(automatic) <= set(AUTOMATIC) or len(set(automatic)) != len(automatic):
            raise MalformedError(
                Reason.MALFORMED,
                f"{CONFIG_NAME}: auto_approve names something that always waits for a person, or nothing",
                expected=f"some of {', '.join(AUTOMATIC)}, each once",
                actual=", ".join(automatic),
            )
    fields.done()
    return CustodianConfig(directory, **texts, **limits, auto_approve=automatic)  # type: ignore[arg-type]


def render_config(config: CustodianConfig) -> str:
    """The file :func:`load_config` reads; every name and address was checked, so none needs escaping."""
    return (
        "# A keyquorum custodian. Every member is described in docs/operators.md.\n"
        f'id = "{config.id}"\n'
        f'jurisdiction = "{config.jurisdiction}"\n'
        f'cluster = "{config.cluster}"\n'
        f'listen = "{config.listen}"\n'
        f'admin_listen = "{config.admin_listen}"\n'
        f'metrics_listen = "{config.metrics_listen}"\n'
        f'witness_listen = "{config.witness_listen}"\n'
        f'roster = "{config.roster}"\n'
        f'operators = "{config.operators}"\n'
        f'owners = "{config.owners}"\n'
        f'bulletins = "{config.bulletins}"\n'
        f'policy_signers = "{config.policy_signers}"\n'
        f'rosters = "{config.rosters}"\n'
        f"bulletin_threshold = {config.bulletin_threshold}\n"
        f"auto_approve = [{', '.join(json.dumps(kind) for kind in config.auto_approve)}]\n"
        f"releases_per_owner_per_hour = {config.releases_per_owner_per_hour}\n"
        f"max_cosignature_age = {config.max_cosignature_age}\n"
        f"shutdown_grace = {config.shutdown_grace}\n"
        f'pkcs11_module = "{check_module(config.pkcs11_module)}"\n'
    )
