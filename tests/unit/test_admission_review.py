"""Reading an AdmissionReview: every malformation is denied, naming field, expected and actual, with the uid echoed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_admission.review import MAX_REVIEW, Seat
from tests.support.admission import UID, ask, completed, pod, review, wrap


def changed(path: str, value: Any) -> dict[str, Any]:
    """A review of a marked pod with one member replaced, or taken away by ``...``."""
    asked = review(completed(pod()))
    *parents, last = path.split(".")
    at: Any = asked
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return asked


@pytest.mark.parametrize(
    ("path", "value", "field", "expected"),
    [
        ("apiVersion", "admission.k8s.io/v1beta1", "apiVersion", "admission.k8s.io/v1"),
        ("kind", "Pod", "kind", "AdmissionReview"),
        ("kind", 7, "kind", "string"),
        ("request.operation", "PATCH", "request.operation", "one of CREATE, UPDATE"),
        ("request.operation", ..., "request.operation", "one of CREATE, UPDATE"),
        ("request.kind", ..., "request.kind.version", "a version and a kind"),
        ("request.kind", "Pod", "request.kind", "object"),
        ("request.kind.kind", "", "request.kind.kind", "a version and a kind"),
        ("request.dryRun", "yes", "request.dryRun", "true or false"),
        ("request.object", ..., "request.object", "an object with CREATE"),
        ("request.object", [], "request.object", "object"),
        ("request.object.kind", "Deployment", "kind", "Pod"),
        ("request.object.apiVersion", "v2", "apiVersion", "v1"),
        ("request.object.metadata", "x", "metadata", "object"),
        ("request.object.metadata.labels", [], "metadata.labels", "object"),
        ("request.object.metadata.annotations.compute", 1, "metadata.annotations", "string"),
        ("request.object.spec", "x", "spec", "object"),
        ("request.object.spec.containers", {}, "spec.containers", "list"),
        ("request.object.spec.containers", [7], "spec.containers[0]", "object"),
        ("request.object.spec.containers", [{}] * 10_001, "spec.containers", "list of at most"),
        ("request.object.spec.hostPID", "true", "spec.hostPID", "true or false"),
        ("request.object.spec.hostPID", 1, "spec.hostPID", "true or false"),
        ("request.object.spec.runtimeClassName", ["kata-qemu-snp"], "spec.runtimeClassName", "string"),
        ("request.object.spec.nodeSelector", "x", "spec.nodeSelector", "object"),
        ("request.object.spec.volumes", "x", "spec.volumes", "list"),
        ("request.object.spec.containers.0.env", {"name": "X"}, "spec.containers[0].env", "list"),
        ("request.object.spec.containers.0.image", {}, "spec.containers[0].image", "string"),
        ("request.object.spec.containers.0.securityContext", [], "spec.containers[0].securityContext", "object"),
    ],
)
def test_a_bad_field_is_named(path: str, value: Any, field: str, expected: str) -> None:
    given = ask(Seat.VALIDATE, changed(path, value))
    response = given.document["response"]
    assert (response["uid"], response["allowed"]) == (UID, False)
    assert response["status"]["code"] == 400
    message = response["status"]["message"]
    assert f"bad field {field}" in message
    assert f"expected {expected}" in message
    assert "got " in message


def test_an_update_needs_the_object_before() -> None:
    given = ask(Seat.VALIDATE, review(completed(pod()), "UPDATE"))
    assert "bad field request.oldObject" in given.document["response"]["status"]["message"]


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (review({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}), "v1 Service"),
        (review({**wrap("Deployment", pod()), "apiVersion": "apps/v2"}), "apps/v2 Deployment"),
        (review(pod(), subResource="status"), "status"),
        (review(wrap("Deployment", pod()), subResource="scale"), "scale"),
    ],
)
def test_what_cannot_be_judged_is_denied(asked: dict[str, Any], what: str) -> None:
    for seat in Seat:
        response = ask(seat, asked).document["response"]
        assert (response["allowed"], response["status"]["reason"]) == (False, "UNSUPPORTED")
        assert what in response["status"]["message"]


def test_members_of_a_newer_api_server_are_ignored() -> None:
    asked = review(completed(pod()), brandNew={"a": [1]})
    asked["another"] = True
    assert ask(Seat.VALIDATE, asked).document["response"]["allowed"]


def test_bounds() -> None:
    asked = json.dumps(review(completed(pod()))).encode()
    assert ask(Seat.VALIDATE, asked + b" " * (MAX_REVIEW - len(asked))).document["response"]["allowed"]
    assert ask(Seat.VALIDATE, asked + b" " * (MAX_REVIEW - len(asked) + 1)).status == 413
    deep: Any = {}
    for _ in range(70):
        deep = {"f:a": deep}
    assert ask(Seat.VALIDATE, changed("request.object.metadata.managedFields", deep)).status == 400


def test_a_refusal_names_everything_up_to_a_bound() -> None:
    many = completed(pod())
    many["spec"]["initContainers"] = [{"name": f"i{number}", "image": "x"} for number in range(200)]
    status = ask(Seat.VALIDATE, review(many)).document["response"]["status"]
    assert (status["code"], status["reason"]) == (403, "Forbidden")
    assert "and 192 more" in status["message"]
    assert len(status["details"]["causes"]) == 64
    assert len(json.dumps(status)) < 64 << 10


def test_what_others_wrote_cannot_move_a_terminal() -> None:
    asked = completed(pod(runtimeClassName="kata-qemu-snp"))
    asked["spec"]["runtimeClassName"] = "\x1b[2Jrunc"
    assert "\x1b" not in ask(Seat.VALIDATE, review(asked)).document["response"]["status"]["message"]


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**31), 2**31), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@given(st.data())
def test_any_value_anywhere_gets_an_answer(data: st.DataObject) -> None:
    """Whatever stands in place of whatever: an answer with the uid, and no exception."""
    asked = review(completed(wrap(data.draw(st.sampled_from(["Pod", "CronJob"])), pod())))
    at: Any = asked["request"]
    steps = data.draw(st.integers(1, 9))
    for step in range(steps):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from([each for each in keys if each != "uid"]))
        if step == steps - 1 or not isinstance(at[key], dict | list) or not at[key]:
            at[key] = data.draw(values)
            break
        at = at[key]
    for seat in Seat:
        given = ask(seat, copy.deepcopy(asked))
        response = given.document["response"]
        assert given.status == 200
        assert response["uid"] == UID
        assert response["allowed"] or response["status"]["code"] in (400, 403)


@given(st.binary(max_size=200))
def test_any_bytes_get_an_answer(data: bytes) -> None:
    given = ask(Seat.VALIDATE, data)
    assert given.document["response"]["allowed"] is False
    assert given.status in (400, 413)
