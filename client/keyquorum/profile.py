"""The profile: where the coordinator is, who the caller is, and what it trusts.

A TOML file; paths in it are relative to it. Trust comes from two pins that reach the caller by another way than the
coordinator: the operators' identities and the SHA-256 of the roster they signed. Nothing the coordinator says can
change either. Earlier rosters lie in a folder ``rosters`` beside the roster, for keys made under them::

    cluster = "demo"
    coordinator = "127.0.0.1:7443"
    coordinator_name = "main"
    roster = "roster.json"
    roster_sha256 = "…"
    operators = "operators.json"
    state_dir = "state"

    [owner]
    name = "alice"
    key = "alice.key.json"
    tls_certificate = "alice-cert.pem"
    tls_key = "alice-key.pem"

``[operator]`` takes the same members, for ``key create``. At least one of the two is there. Whoever runs drills adds
``drill = "drill.pub.json"``, the coordinator's drill identity: a report that it did not sign is none.
"""

from __future__ import annotations

import hmac
import os
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from keyquorum.keyfiles import read_public_keys
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import MAX_ROSTER, Roster, open_roster, parse_operators
from keyquorum_core.signing import PublicIdentity
from keyquorum_core.strictjson import Fields
from keyquorum_core.succession import earlier_rosters
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.tls import TlsIdentity

__all__ = ["ENVIRONMENT", "Principal", "Profile", "load_profile"]

ENVIRONMENT = "KEYQUORUM_PROFILE"
MAX_EARLIER = 64
ROSTERS = "rosters"
"""The folder beside the roster in which earlier versions lie."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who the caller is in one role: a name, the wrapped private key file, and the mTLS identity."""

    role: str
    name: str
    key_file: Path
    tls: TlsIdentity


@dataclass(frozen=True, slots=True)
class Profile:
    """A verified profile: the roster is signed by the pinned operators, current, and the pinned one."""

    cluster: str
    coordinator: str
    coordinator_name: str
    roster: Roster
    roster_envelope: bytes
    quorum: Quorum
    owner: Principal | None
    operator: Principal | None
    state_dir: Path
    drill: PublicIdentity | None = None
    """Who signs drill reports, where the profile pins it."""
    earlier: Mapping[str, Roster] = field(default_factory=dict)
    """Rosters before the pinned one, by digest: keys made under them are verified with them."""

    def roster_of(self, digest: str) -> Roster:
        """The roster of that digest; the pinned one where it is not at hand."""
        return self.earlier.get(digest, self.roster)

    def drill_identity(self) -> PublicIdentity:
        """Raises :class:`StateError` (``NOT_FOUND``) where the profile pins none."""
        if self.drill is None:
            raise StateError(
                Reason.NOT_FOUND,
                "the profile doesn't say who signs drill reports",
                expected='a member drill = "drill.pub.json" in the profile',
                actual="none",
                next_step="Get drill.pub.json from the coordinator's operator, compare its fingerprint, and name it.",
            )
        return self.drill

    def principal(self, role: str) -> Principal:
        """Raises :class:`StateError` (``ROLE``) where the profile has no such section."""
        found = self.owner if role == "owner" else self.operator
        if found is None:
            raise StateError(
                Reason.ROLE,
                f"this needs the role {role}, which the profile doesn't give",
                expected=f"a section [{role}] in the profile",
                next_step=f"Use a profile with an {role}'s key and certificate",
            )
        return found


def load_profile(path: str | os.PathLike[str], *, now: int | None = None) -> Profile:
    """Read and verify a profile.

    Raises :class:`MalformedError` for a profile or file that isn't well-formed, :class:`RefusedError` (``ROSTER``,
    ``SIGNATURE``, ``EXPIRED`` …) for a roster that isn't the pinned one, :class:`UnavailableError` for missing files.
    """
    file = Path(path)
    try:
        parsed = tomllib.loads(read_bytes(file, "profile").decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MalformedError(Reason.MALFORMED, f"profile {file} is not TOML", actual=str(error)[:200]) from None
    base = file.parent
    fields = Fields(parsed, "profile")
    cluster = fields.text("cluster", max_length=64)
    coordinator = fields.text("coordinator")
    coordinator_name = fields.text("coordinator_name", max_length=64)
    roster_path = base / fields.text("roster", max_length=4096)
    pin = fields.hex("roster_sha256", 32).hex()
    operators, threshold = parse_operators(
        read_bytes(base / fields.text("operators", max_length=4096), "operators file")
    )
    owner = _principal(fields, "owner", base)
    operator = _principal(fields, "operator", base)
    state_dir = base / fields.text("state_dir", max_length=4096)
    drill = read_public_keys(base / fields.text("drill", max_length=4096)).identity if "drill" in fields else None
    fields.done()
    if owner is None and operator is None:
        raise MalformedError(Reason.MALFORMED, "profile names nobody", expected="a section [owner] or [operator]")
    envelope = read_bytes(roster_path, "roster", MAX_ROSTER)
    roster = open_roster(envelope, operators, threshold, int(time.time()) if now is None else now, cluster=cluster)
    if not hmac.compare_digest(roster.digest, pin):
        raise RefusedError(
            Reason.ROSTER,
            "the roster is not the one that the profile pins",
            expected=pin,
            actual=roster.digest,
            next_step="Get the roster and its SHA-256 from an operator, by a way that the coordinator doesn't control",
        )
    return Profile(
        cluster,
        coordinator,
        coordinator_name,
        roster,
        envelope,
        roster.quorum_of(),
        owner,
        operator,
        state_dir,
        drill,
        _earlier(roster, roster_path.parent / ROSTERS),
    )


def _earlier(roster: Roster, folder: Path) -> Mapping[str, Roster]:
    """The rosters before it that lie in ``folder``; each is known by the digest that the next one names."""
    if not roster.previous or not folder.is_dir():
        return {}
    paths = sorted(folder.glob("*.json"))[-MAX_EARLIER:]
    return earlier_rosters(roster, [read_bytes(path, "earlier roster", 2 * MAX_ROSTER) for path in paths])


def _principal(fields: Fields, role: str, base: Path) -> Principal | None:
    if role not in fields:
        return None
    section = fields.object(role)
    name = section.text("name", max_length=64)
    key_file = base / section.text("key", max_length=4096)
    certificate = read_bytes(base / section.text("tls_certificate", max_length=4096), f"{role}'s TLS certificate")
    key = read_bytes(base / section.text("tls_key", max_length=4096), f"{role}'s TLS key")
    section.done()
    return Principal(role, name, key_file, TlsIdentity(certificate, key))
