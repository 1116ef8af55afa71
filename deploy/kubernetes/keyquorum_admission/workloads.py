"""Which objects hold pods, where in them the pod stands, and where a mark on them counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keyquorum_admission.tree import Node
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["WORKLOADS", "Workload", "workload"]

_TEMPLATE: Final = ("spec", "template")
_POD: Final[tuple[str, ...]] = ()
WORKLOADS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("v1", "Pod"): _POD,
    ("v1", "ReplicationController"): _TEMPLATE,
    ("apps/v1", "Deployment"): _TEMPLATE,
    ("apps/v1", "ReplicaSet"): _TEMPLATE,
    ("apps/v1", "StatefulSet"): _TEMPLATE,
    ("apps/v1", "DaemonSet"): _TEMPLATE,
    ("batch/v1", "Job"): _TEMPLATE,
    ("batch/v1", "CronJob"): ("spec", "jobTemplate", *_TEMPLATE),
}
"""By (apiVersion, kind): the members that lead to the pod, which is the object itself for a Pod."""
_IMMUTABLE: Final = frozenset({"Pod", "Job"})


@dataclass(frozen=True, slots=True)
class Workload:
    """An object that holds a pod. ``pod_path`` leads to what has the pod's ``metadata`` and ``spec``."""

    kind: str
    root: Node
    pod_path: tuple[str, ...]

    @property
    def pod(self) -> Node:
        return self.root.at(*self.pod_path)

    @property
    def template_is_fixed(self) -> bool:
        """Whether Kubernetes refuses a change of the pod once the object is there."""
        return self.kind in _IMMUTABLE

    def metadata(self) -> list[Node]:
        """Every metadata that a mark counts in, the object's first and the pod's last."""
        places = [self.root.child("metadata")]
        at = self.root
        for name in self.pod_path:
            at = at.child(name)
            if name in ("jobTemplate", "template"):
                places.append(at.child("metadata"))
        return places


def workload(root: Node, api_version: str, kind: str) -> Workload:
    """Raises :class:`MalformedError`: ``UNSUPPORTED`` for a kind without a pod, ``MALFORMED`` for an object that says
    it is of another kind."""
    path = WORKLOADS.get((api_version, kind))
    if path is None:
        raise MalformedError(
            Reason.UNSUPPORTED,
            "this kind of object cannot be judged",
            expected=", ".join(f"{version} {name}" for version, name in WORKLOADS),
            actual=f"{api_version} {kind}"[:200],
        )
    for name, expected in (("apiVersion", api_version), ("kind", kind)):
        stated = root.child(name).text()
        if stated != expected:
            raise MalformedError(
                Reason.MALFORMED, f"bad field {root.child(name).path}", expected=expected, actual=stated[:200]
            )
    return Workload(kind, root, path)
