"""Policies on the operator's desk: shipped sets, folders of Cedar, controls and signed bundles, read alike.

Where a command takes policies it takes any of: a folder with ``*.cedar`` files; one such file; a ``controls.yaml``; a
signed bundle, whose signatures are *not* verified here, since whose count is for the seat to say that acts on it; or
the name of a shipped set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from keyquorum.documents import load_document
from keyquorum_core.bulletin import MAX_BULLETIN_ENVELOPE, Bulletin, peek_bulletin, sign_bulletin
from keyquorum_core.errors import MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.policy.bundle import POLICY_KIND, PolicyBundle
from keyquorum_core.policy.controls import Controls, read_controls
from keyquorum_core.policy.controls_cedar import compile_controls
from keyquorum_core.policy.engine import PolicyEngine
from keyquorum_core.policy.facts import encode
from keyquorum_core.policy.lists import LIST_KINDS, ControlledList
from keyquorum_core.policy.policies import MAX_TEXT, PolicySet, load_policies
from keyquorum_core.policy.scenarios import Scenario, read_scenarios
from keyquorum_core.signing import Identity
from keyquorum_protos.wire.files import read_bytes

__all__ = [
    "SETS",
    "Source",
    "compile_set",
    "load_controls",
    "load_scenarios",
    "load_source",
    "set_scenarios",
    "sign_list",
    "sign_policy",
]

SETS = ("export-controlled", "research-open", "residency-eu")
_HERE = "keyquorum.policy_sets"


@dataclass(frozen=True, slots=True)
class Source:
    """Validated policies, and where they came from. ``custodians`` are those of a signed bundle, else empty."""

    name: str
    files: Mapping[str, str]
    policies: PolicySet
    custodians: tuple[str, ...] = ()
    version: int = 1
    digest: str = ""

    def engine(self) -> PolicyEngine:
        return PolicyEngine(self.policies, bundle_digest=self.digest, bundle_version=self.version)


def shipped(name: str, suffix: str = ".yaml") -> bytes:
    """A file of a shipped set. Raises :class:`StateError` (``NOT_FOUND``)."""
    if name not in SETS:
        raise StateError(Reason.NOT_FOUND, "no such set of controls", expected=", ".join(SETS), actual=name[:64])
    return files(_HERE).joinpath(name + suffix).read_bytes()


def load_controls(where: str) -> Controls:
    """A ``controls.yaml``, or a shipped set by its name. Raises :class:`MalformedError`, ``NOT_FOUND``."""
    data = shipped(where) if where in SETS else read_bytes(Path(where), "controls")
    return read_controls(load_document(data, f"controls {where}"))


def compile_set(where: str) -> dict[str, str]:
    """The policy files of controls; loaded once, so that what they compile to is known to be sound."""
    out = compile_controls(load_controls(where))
    load_policies(out)
    return out


def load_scenarios(path: Path) -> tuple[Scenario, ...]:
    return read_scenarios(load_document(read_bytes(path, "scenario table"), f"scenario table {path.name}"))


def set_scenarios(name: str) -> tuple[Scenario, ...]:
    """The scenarios that come with a shipped set."""
    return read_scenarios(load_document(shipped(name, ".scenarios.yaml"), f"the scenarios of {name}"))


def load_source(where: str) -> Source:
    """Policies from any of the places above. Raises :class:`MalformedError` (``POLICY`` …), ``NOT_FOUND``."""
    path = Path(where)
    if where in SETS or path.suffix in (".yaml", ".yml"):
        return _source(where, compile_set(where))
    if path.is_dir():
        found = sorted(path.glob("*.cedar"))
        if not found:
            raise UnavailableError(Reason.NOT_FOUND, f"{path} holds no policies", expected="files *.cedar")
        return _source(where, {each.name: _text(each) for each in found})
    if path.suffix == ".cedar":
        return _source(where, {path.name: _text(path)})
    bulletin = peek_bulletin(read_bytes(path, "policies", max_bytes=MAX_BULLETIN_ENVELOPE))
    if bulletin.kind != POLICY_KIND:
        raise MalformedError(Reason.POLICY, f"{path} is no policy bundle", expected=POLICY_KIND, actual=bulletin.kind)
    bundle = PolicyBundle.read(bulletin.body)
    return Source(where, bundle.files, bundle.policies, bundle.custodians, bulletin.version, bulletin.digest)


def _source(where: str, texts: Mapping[str, str]) -> Source:
    digest = hashlib.sha256(encode(dict(texts)).encode()).hexdigest()
    return Source(where, texts, load_policies(texts), digest=digest)


def _text(path: Path) -> str:
    try:
        return read_bytes(path, "policy file", max_bytes=MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedError(Reason.MALFORMED, f"{path} is not UTF-8 text") from None


def sign_policy(
    source: Source,
    signers: Iterable[Identity],
    *,
    cluster: str,
    custodians: Iterable[str],
    version: int,
    now: int,
    days: int,
) -> bytes:
    """A signed bundle of these policies for these custodians, or for the coordinator where there are none."""
    ids = tuple(custodians)
    bundle = PolicyBundle.make("custodian" if ids else "coordinator", ids, source.files)
    return sign_bulletin(Bulletin(cluster, POLICY_KIND, version, now, now + days * 86400, bundle.body()), signers)


def sign_list(
    name: str, path: Path, signers: Iterable[Identity], *, cluster: str, version: int, now: int, days: int
) -> bytes:
    """A signed list (``export`` or ``sanctions``) of the entries in a YAML or JSON file."""
    if name not in LIST_KINDS:
        raise MalformedError(Reason.MALFORMED, "no such list", expected=" or ".join(LIST_KINDS), actual=name[:32])
    document = load_document(read_bytes(path, "list"), f"list {path.name}")
    if not isinstance(document, Mapping):
        raise MalformedError(Reason.MALFORMED, f"{path.name} is not an object", expected="object with 'entries'")
    found = ControlledList.read(document, version)
    return sign_bulletin(Bulletin(cluster, LIST_KINDS[name], version, now, now + days * 86400, found.body()), signers)
