"""Drill reports: their exact bytes, and that none can say that a drill passed whose checks did not."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.drill_report import (
    DRILL_REPORT_TYPE,
    FULL,
    KINDS,
    Check,
    DrillReport,
    Outcome,
    Part,
    clip,
    open_report,
    sign_report,
)
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.signing import Identity
from tests.support.fake_drills import RAN, report_of

ROOT = Path(__file__).resolve().parents[2]
VECTORS = json.loads((ROOT / "docs/spec/vectors/drill-report.json").read_text())["vectors"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    payload = vector["payload"].encode()
    if vector["expect"] == "ok":
        report = DrillReport.parse(payload)
        assert (report.payload(), report.digest) == (payload, vector["sha256"])
        return
    with pytest.raises(MalformedError) as caught:
        DrillReport.parse(payload)
    assert caught.value.reason == vector["expect"]


def test_the_vectors_are_what_the_script_makes() -> None:
    script = ROOT / "scripts" / "make_drill_vectors.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


def test_the_signed_bytes_are_the_payload_s_and_only_the_pinned_identity_s_count() -> None:
    identity = Identity.from_seeds(bytes(range(32)), bytes(range(32, 64)))
    report = report_of(RAN, FULL, failed="repair")
    envelope = sign_report(report, identity)
    parsed = json.loads(envelope)
    assert parsed["payloadType"] == DRILL_REPORT_TYPE == "application/vnd.keyquorum.drill-report.v1+json"
    assert base64.b64decode(parsed["payload"]) == report.payload()
    assert open_report(envelope, identity.public) == report
    with pytest.raises(KeyquorumError) as caught:
        open_report(envelope, Identity.generate().public)
    assert caught.value.reason is Reason.SIGNATURE


_TEXTS = st.text(max_size=500).map(clip)
_CHECKS = st.builds(Check, _TEXTS.filter(bool), _TEXTS, _TEXTS, st.booleans())


@given(
    st.sampled_from(KINDS),
    st.sampled_from(Outcome),
    st.lists(_CHECKS, max_size=4).map(tuple),
    st.sampled_from(["", "TIMEOUT"]),
    _TEXTS,
)
def test_what_can_be_made_can_be_read_and_a_part_passed_only_with_its_checks(
    kind: str, outcome: Outcome, checks: tuple[Check, ...], reason: str, cause: str
) -> None:
    try:
        part = Part(kind, 0, 5, outcome, ("ch-1",), 1, None, reason, cause, checks)
    except MalformedError:
        return
    if part.outcome is Outcome.PASSED:
        assert checks
        assert all(each.passed for each in checks)
    assert Part.read(part.as_json()) == part


@given(st.text(max_size=1000))
def test_any_text_is_clipped_to_one_printable_line(text: str) -> None:
    clipped = clip(text)
    assert clip(clipped) == clipped
    assert len(clipped) <= 400
    assert clipped.isprintable()
