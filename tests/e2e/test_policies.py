"""Policies across a whole cluster: each custodian its own, changed while it runs, and what a quorum makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import keyquorum
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.signing import Identity
from tests.support.cluster import Running, deciding, eventually, operator_of

NOT_HERE = (
    '@id("own.no-workers") forbid (principal is Worker, action == Action::"release", resource)\n'
    'when { principal.provider == "this-machine" };\n'
)
NOBODY = '@id("own.nobody") forbid (principal, action == Action::"release", resource);\n'


@pytest.fixture(scope="module")
def operator(running: Running) -> Identity:
    return operator_of(running)


def submit(client: keyquorum.Client, running: Running, job: Path, **changes: str) -> keyquorum.SubmittedJob:
    return client.submit(job, key=running.key, regions=[running.region], **changes)  # type: ignore[arg-type]


def test_a_job_that_the_coordinators_policy_denies_is_refused_before_anybody_is_asked(
    running: Running, job: Path
) -> None:
    with running.connect() as client:
        before = len(client.jobs())
        with pytest.raises(KeyquorumError) as caught:
            submit(client, running, job, classification="top-secret")
        assert caught.value.reason is Reason.POLICY
        assert caught.value.details["field"] == "resource.classification"
        assert "top-secret" in caught.value.actual
        assert caught.value.details["policy_version"] == "1"
        assert len(client.jobs()) == before


def test_g2_custodians_that_deny_are_named_and_a_quorum_of_others_releases(
    running: Running, operator: Identity, job: Path
) -> None:
    """G2: each custodian decides for itself; the job runs on the shares of those that permit it."""
    with running.connect() as client, deciding(running, operator, NOT_HERE, "ch-1", "jp-1"):
        submitted = submit(client, running, job)
        assert not submitted.refused  # the owner is permitted everywhere
        result = client.result(submitted.id)
        assert set(result.custodians) <= {"ch-2", "de-1", "is-1"}
        assert json.loads(result.files["result.json"])["echo"]
    with running.connect() as client, deciding(running, operator, NOBODY, "ch-1", "jp-1"):
        submitted = submit(client, running, job)  # three are left: it waits for the others too, in vain
        assert set(submitted.refused) == {"ch-1", "jp-1"}
        for why in submitted.refused.values():
            assert "POLICY" in why
            assert "own.nobody" in why
        assert not submitted.confirmed
        assert set(client.result(submitted.id).custodians) == {"ch-2", "de-1", "is-1"}


def test_without_a_quorum_of_permits_nobody_gets_the_key(running: Running, operator: Identity, job: Path) -> None:
    with running.connect() as client, deciding(running, operator, NOBODY, "ch-1", "de-1", "is-1"):
        with pytest.raises(KeyquorumError) as caught:
            submit(client, running, job)
        assert caught.value.reason is Reason.NO_QUORUM
        for name in ("ch-1", "de-1", "is-1"):
            assert "own.nobody" in caught.value.details[name]
        assert "ch-2" not in caught.value.details
    with running.connect() as client:  # their next bundles are back to normal, and so are they, without a restart
        submitted = submit(client, running, job)
        eventually(lambda: client.job(submitted.id).final, "the job is over", 60)
        assert client.result(submitted.id).exit_code == 0
