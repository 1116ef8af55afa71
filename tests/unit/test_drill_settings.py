"""What coordinator.toml may say of drills; and that the documents of a *revocation* do nothing else."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest

from keyquorum_coordinator.config import CoordinatorConfig, DrillSettings, load_config
from keyquorum_coordinator.drills.documents import check_documents
from keyquorum_coordinator.init import initialise
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.revocations import NOTHING, Revocation, Revocations

DRILL, OTHER = "aa" * 32, "bb" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("drills") / "coordinator"
    initialise(CoordinatorConfig(made, "main", "demo", "127.0.0.1:0", ""), now=1_800_000_000)
    return made


def settings(folder: Path, table: str) -> DrillSettings:
    file = folder / "coordinator.toml"
    plain = file.read_text()
    try:
        file.write_text(f"{plain}\n{table}")
        return load_config(folder).drills
    finally:
        file.write_text(plain)


def test_schedules_are_read(folder: Path) -> None:
    assert settings(folder, "") == DrillSettings()
    table = '[drills]\nkey = "canary"\nclassification = "research"\nschedule = { rotation = "7d", full = "12h" }\n'
    assert settings(folder, table) == DrillSettings("canary", "research", {"rotation": 7 * 86400, "full": 12 * 3600})


@pytest.mark.parametrize(
    "table",
    [
        '[drills]\nschedule = { rotation = "7d" }',  # about which key?
        '[drills]\nkey = "canary"\nschedule = { rotation = "1m" }',
        '[drills]\nkey = "canary"\nschedule = { rotation = "7" }',
        '[drills]\nkey = "canary"\nschedule = { rotation = "9999d" }',
        '[drills]\nkey = "canary"\nschedule = { rotations = "7d" }',
        '[drills]\nkey = "canary"\nschedule = { revocation = "7d" }',  # nobody is there to sign it
        '[drills]\nkey = "Not A Key"',
        '[drills]\nkey = "canary"\nevery = "7d"',
    ],
)
def test_what_a_schedule_cannot_be_is_refused(folder: Path, table: str) -> None:
    with pytest.raises(KeyquorumError) as caught:
        settings(folder, table)
    assert caught.value.reason is Reason.MALFORMED


def test_a_scheduled_revocation_is_refused_by_its_name_and_why(folder: Path) -> None:
    with pytest.raises(KeyquorumError) as caught:
        settings(folder, '[drills]\nkey = "canary"\nschedule = { rotation = "7d", revocation = "7d" }')
    assert caught.value.actual == "revocation"
    assert "operators sign" in caught.value.message


def document(version: int, revoked: tuple[str, ...], lifted: tuple[str, ...] = ()) -> Revocations:
    def entries(subjects: tuple[str, ...]) -> MappingProxyType[tuple[str, str], Revocation]:
        return MappingProxyType({("owner", each): Revocation("owner", each, "a drill", 1) for each in subjects})

    return Revocations(version, f"{version}", entries(revoked), entries(lifted))


def test_only_documents_that_revoke_the_drills_owner_and_lift_it_are_taken() -> None:
    check_documents(NOTHING, document(1, (DRILL,)), document(2, (), (DRILL,)), DRILL)
    present = document(4, (OTHER,))
    check_documents(present, document(5, (OTHER, DRILL)), document(6, (OTHER,), (DRILL,)), DRILL)
    for revoke, lift in (
        (document(5, (OTHER,)), document(6, (OTHER,))),  # revokes nothing
        (document(5, (DRILL,), (OTHER,)), document(6, (), (DRILL, OTHER))),  # lifts another's
        (document(5, (OTHER, DRILL, "cc" * 32)), document(6, (OTHER, "cc" * 32), (DRILL,))),  # revokes another
        (document(5, (OTHER, DRILL)), document(6, (OTHER, DRILL))),  # never lifts it
        (document(6, (OTHER, DRILL)), document(7, (OTHER,), (DRILL,))),  # of other versions
    ):
        with pytest.raises(KeyquorumError) as caught:
            check_documents(present, revoke, lift, DRILL)
        assert caught.value.reason is Reason.BULLETIN
