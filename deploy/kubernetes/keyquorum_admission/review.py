"""AdmissionReview v1 in, AdmissionReview v1 out: pure, and an answer to whatever bytes came.

Members of the review that nobody here reads are ignored, as Kubernetes' API rules ask of readers: a newer API server
may add some, and ``failurePolicy: Fail`` would turn strictness there into a cluster that admits nothing. What is read
is read strictly, and what cannot be read is denied.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from keyquorum_admission.config import Settings
from keyquorum_admission.findings import Finding, Rule
from keyquorum_admission.judge import judge
from keyquorum_admission.marks import judge_namespace
from keyquorum_admission.mutate import complete
from keyquorum_admission.tree import Node
from keyquorum_admission.workloads import workload
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, printable
from keyquorum_core.strictjson import loads

__all__ = ["MAX_REVIEW", "Answer", "Review", "Seat", "answer", "denial", "parse_review"]

MAX_REVIEW: Final = 8 << 20
"""Bytes: an object and the one before it, each at most what the API server takes (3 MiB), and room."""
_MAX_DEPTH: Final = 64
_UID: Final = re.compile(r"[A-Za-z0-9-]{1,128}", re.ASCII)
_OPERATIONS: Final = ("CREATE", "UPDATE", "DELETE", "CONNECT")
_SUBRESOURCES: Final = {"Pod": ("", "ephemeralcontainers", "resize")}
_SESSIONS: Final = ("exec", "attach", "portforward", "proxy")
_MAX_SHOWN: Final = 8
_MAX_CAUSES: Final = 64


class Seat(StrEnum):
    """Which webhook asks. ``required``: its namespaceSelector picked a namespace all of whose pods must attest."""

    MUTATE = "mutate"
    MUTATE_REQUIRED = "mutate/required"
    VALIDATE = "validate"
    VALIDATE_REQUIRED = "validate/required"

    @property
    def mutates(self) -> bool:
        return self in (Seat.MUTATE, Seat.MUTATE_REQUIRED)

    @property
    def by_namespace(self) -> bool:
        return self in (Seat.MUTATE_REQUIRED, Seat.VALIDATE_REQUIRED)


@dataclass(frozen=True, slots=True)
class Review:
    """A request. ``object`` and ``old`` hold nothing where the operation has none."""

    uid: str
    operation: str
    api_version: str
    kind: str
    subresource: str
    namespace: str
    name: str
    dry_run: bool
    object: Node
    old: Node


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` is HTTP's: 200 whenever the request's uid could be read, since the API server reads nothing else."""

    status: int
    document: dict[str, Any]
    outcome: str
    """``allowed``, ``patched``, ``refused`` or ``malformed``."""
    findings: tuple[Finding, ...] = ()
    review: Review | None = None
    error: KeyquorumError | None = field(default=None)


def answer(settings: Settings, seat: Seat, body: bytes) -> Answer:
    """Decide. Never raises for anything that ``body`` may be."""
    uid = ""
    try:
        root = Node(loads(body, "the AdmissionReview", max_bytes=MAX_REVIEW, max_depth=_MAX_DEPTH), "")
        uid = _uid(root)
        review = parse_review(root)
        patch, findings = _decide(settings, seat, review)
    except KeyquorumError as error:
        return denial(uid, error)
    if findings:
        return _refusal(review, findings)
    response: dict[str, Any] = {"uid": uid, "allowed": True}
    if patch:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(json.dumps(patch, separators=(",", ":")).encode()).decode()
    return Answer(200, _document(response), "patched" if patch else "allowed", review=review)


def parse_review(root: Node) -> Review:
    """Raises :class:`MalformedError` naming field, expected and actual."""
    _literal(root.child("apiVersion"), "admission.k8s.io/v1")
    _literal(root.child("kind"), "AdmissionReview")
    request = root.child("request")
    operation = request.child("operation")
    if operation.text() not in _OPERATIONS:
        _bad(operation, f"one of {', '.join(_OPERATIONS)}")
    kind = request.child("kind")
    group, version = kind.child("group").text(), kind.child("version").text()
    if not version or not kind.child("kind").text():
        _bad(kind.child("version" if not version else "kind"), "a version and a kind")
    review = Review(
        uid=_uid(root),
        operation=operation.text(),
        api_version=f"{group}/{version}" if group else version,
        kind=kind.child("kind").text(),
        subresource=request.child("subResource").text(),
        namespace=request.child("namespace").text(),
        name=request.child("name").text(),
        dry_run=request.child("dryRun").flag(),
        object=Node(request.child("object").value, ""),
        old=Node(request.child("oldObject").value, ""),
    )
    for name, needed in (("object", ("CREATE", "UPDATE")), ("oldObject", ("UPDATE", "DELETE"))):
        part = request.child(name)
        if not part.present and review.operation in needed:
            _bad(part, f"an object with {review.operation}")
        part.members()
    return review


def _decide(settings: Settings, seat: Seat, review: Review) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The patch and the findings. Raises :class:`MalformedError`."""
    if review.operation == "CONNECT":
        return [], _session(seat, review)
    if review.operation == "DELETE":
        return [], []
    old = review.old if review.operation == "UPDATE" else None
    if (review.api_version, review.kind) == ("v1", "Namespace"):
        return [], judge_namespace(review.object, old)
    now = workload(review.object, review.api_version, review.kind)
    before = None if old is None else workload(old, review.api_version, review.kind)
    if review.subresource not in _SUBRESOURCES.get(review.kind, ("",)):
        raise MalformedError(
            Reason.UNSUPPORTED,
            f"this subresource of {review.kind} cannot be judged",
            expected=", ".join(each or "none" for each in _SUBRESOURCES.get(review.kind, ("",))),
            actual=review.subresource[:100],
        )
    if seat.mutates:
        patch, findings = complete(settings, now, before, seat.by_namespace)
        return patch.operations, findings
    return [], judge(settings, now, before, seat.by_namespace)


def _session(seat: Seat, review: Review) -> list[Finding]:
    """Into pods of a namespace that must attest nobody goes. A request to connect does not show the pod, so elsewhere
    this cannot be known here."""
    if not seat.by_namespace or review.subresource not in _SESSIONS:
        return []
    message = "nobody gets into a pod whose namespace requires attestation"
    return [Finding(Rule.SESSION, "request.subResource", message, "no session", review.subresource)]


def denial(uid: str, error: KeyquorumError) -> Answer:
    """For a request that could not be read, or judged."""
    code = 400
    if error.reason is Reason.TOO_LARGE:
        code = 413
    elif not isinstance(error, MalformedError):
        code = 503
    message = printable(str(error))[:2000]
    status = {"status": "Failure", "reason": str(error.reason), "code": code, "message": message}
    document = _document({"uid": uid, "allowed": False, "status": status})
    return Answer(200 if uid else code, document, "malformed", error=error)


def _refusal(review: Review, findings: list[Finding]) -> Answer:
    shown = "; ".join(str(each) for each in findings[:_MAX_SHOWN])
    if len(findings) > _MAX_SHOWN:
        shown += f"; and {len(findings) - _MAX_SHOWN} more"
    causes = [
        {
            "reason": str(each.rule),
            "field": each.field,
            "message": printable(f"{each.message}: expected {each.expected}, got {each.actual}"),
        }
        for each in findings[:_MAX_CAUSES]
    ]
    status = {
        "status": "Failure",
        "reason": "Forbidden",
        "code": 403,
        "message": printable(f"keyquorum: {shown}"),
        "details": {"name": review.name, "kind": review.kind, "causes": causes},
    }
    document = _document({"uid": review.uid, "allowed": False, "status": status})
    return Answer(200, document, "refused", tuple(findings), review)


def _document(response: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}


def _uid(root: Node) -> str:
    uid = root.at("request", "uid")
    if not _UID.fullmatch(uid.text()):
        _bad(uid, "1 to 128 letters, digits and dashes")
    return uid.text()


def _literal(node: Node, expected: str) -> None:
    if node.text() != expected:
        _bad(node, expected)


def _bad(node: Node, expected: str) -> None:
    actual = node.text()[:100] if isinstance(node.value, str) else "nothing"
    raise MalformedError(Reason.MALFORMED, f"bad field {node.path}", expected=expected, actual=actual)
