"""Profiles: what they pin holds, and what is wrong with one is said."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from keyquorum.profile import load_profile
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.roster import parse_operators, sign_roster
from keyquorum_core.signing import Identity
from tests.support.client_world import the_world

WORLD = the_world()


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return WORLD.write_profile(tmp_path, "127.0.0.1:7443")


def test_a_profile_is_verified_and_its_paths_are_relative_to_it(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    loaded = load_profile(profile)
    assert loaded.roster == WORLD.roster
    assert loaded.quorum == WORLD.quorum
    assert loaded.principal("owner").name == "alice"
    assert loaded.principal("operator").name == "oscar"
    assert loaded.state_dir == profile.parent / "state"
    assert "PRIVATE" not in repr(loaded)


def test_a_role_that_the_profile_does_not_give_is_said_so(tmp_path: Path) -> None:
    loaded = load_profile(WORLD.write_profile(tmp_path, "127.0.0.1:7443", operator=False))
    with pytest.raises(StateError) as caught:
        loaded.principal("operator")
    assert caught.value.reason is Reason.ROLE


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(profile: Path) -> None:
        text = profile.read_text()
        assert old in text
        profile.write_text(text.replace(old, new))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda profile: (profile.parent / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(profile: Path) -> None:
        (profile.parent / name).write_bytes(data)

    return change


def drop_sections(profile: Path) -> None:
    profile.write_text(profile.read_text().split("\n[")[0])


STRANGER = base64.b64encode(Identity.generate().public.to_bytes()).decode()


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (edit('cluster = "test"', 'cluster = "other"'), RefusedError, Reason.ROSTER),
        (edit(WORLD.roster.digest, "00" * 32), RefusedError, Reason.ROSTER),
        (edit(WORLD.roster.digest, "short"), MalformedError, Reason.MALFORMED),
        (edit("coordinator_name", "coordinator_nme"), MalformedError, Reason.MALFORMED),
        (edit("[owner]", "insecure = true\n[owner]"), MalformedError, Reason.MALFORMED),
        (write("profile.toml", b"= ="), MalformedError, Reason.MALFORMED),
        (write("profile.toml", b"\xff\xfe"), MalformedError, Reason.MALFORMED),
        (drop_sections, MalformedError, Reason.MALFORMED),
        (remove("roster.json"), UnavailableError, Reason.NOT_FOUND),
        (remove("operators.json"), UnavailableError, Reason.NOT_FOUND),
        (remove("alice-key.pem"), UnavailableError, Reason.NOT_FOUND),
        (remove("profile.toml"), UnavailableError, Reason.NOT_FOUND),
        (write("roster.json", b"{}"), MalformedError, Reason.MALFORMED),
        (write("roster.json", bytes(5 << 20)), MalformedError, Reason.TOO_LARGE),
        (write("roster.json", sign_roster(WORLD.roster, [Identity.generate()])), RefusedError, Reason.SIGNATURE),
        (
            write(
                "roster.json",
                sign_roster(replace(WORLD.roster, version=2, previous=WORLD.roster.digest), [WORLD.operator]),
            ),
            RefusedError,
            Reason.ROSTER,
        ),
        (
            write("operators.json", json.dumps({"threshold": 1, "operators": {"oscar": STRANGER}}).encode()),
            RefusedError,
            Reason.SIGNATURE,
        ),
        (
            write("operators.json", json.dumps({"threshold": 2, "operators": {"oscar": STRANGER}}).encode()),
            MalformedError,
            Reason.MALFORMED,
        ),
        (write("operators.json", b'{"threshold": 0, "operators": {}}'), MalformedError, Reason.MALFORMED),
        (write("operators.json", b'{"threshold": 1, "operators": {"x": "AAAA"}}'), MalformedError, Reason.MALFORMED),
    ],
)
def test_a_profile_that_does_not_hold_is_refused(
    profile: Path, change: Callable[[Path], None], kind: type[KeyquorumError], reason: Reason
) -> None:
    change(profile)
    with pytest.raises(kind) as caught:
        load_profile(profile)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("at", "reason"), [(WORLD.roster.expires_at, Reason.EXPIRED), (0, Reason.NOT_YET_VALID)], ids=["past", "future"]
)
def test_an_expired_or_future_roster_is_refused(profile: Path, at: int, reason: Reason) -> None:
    with pytest.raises(RefusedError) as caught:
        load_profile(profile, now=at)
    assert caught.value.reason is reason


def test_operators_files_are_read_by_name(profile: Path) -> None:
    operators, threshold = parse_operators((profile.parent / "operators.json").read_bytes())
    assert (operators, threshold) == ({"oscar": WORLD.operator.public}, 1)
