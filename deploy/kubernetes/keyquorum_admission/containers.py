"""What every container of a pod that must attest has to meet: pinned, unprivileged, and given no key."""

from __future__ import annotations

from typing import Final

from keyquorum_admission.config import PINNED, Settings
from keyquorum_admission.findings import Finding, Rule
from keyquorum_admission.tree import Node
from keyquorum_admission.worker import WORKER, WORKER_VOLUMES

__all__ = ["judge_container", "judge_security_context"]

_CAPABILITIES: Final = frozenset({"NET_BIND_SERVICE"})
_SOURCES: Final = frozenset({"fieldRef", "resourceFieldRef", "configMapKeyRef", "fileKeyRef"})
_BY_THE_MAIN_LIST: Final = "containers["


def judge_container(settings: Settings, container: Node) -> list[Finding]:
    """``container`` stands in any of a pod's three lists; the worker itself is judged by its own rules besides."""
    is_worker = container.child("name").text() == WORKER and f".{_BY_THE_MAIN_LIST}" in f".{container.path}"
    findings = judge_security_context(container.child("securityContext"))
    findings += _secrets(settings, container)
    if not is_worker:
        findings += _image(settings, container.child("image"))
    for device in container.child("volumeDevices").items():
        findings.append(Finding(Rule.VOLUME, device.path, "a raw block device", "no volumeDevices", "a device"))
    for mount in container.child("volumeMounts").items():
        name = mount.child("name").text()
        if name in WORKER_VOLUMES and not is_worker:
            message = "mounts a folder of the worker, where plaintext lies"
            findings.append(Finding(Rule.HOST, mount.path, message, f"mounted by {WORKER!r} alone", name))
        if mount.child("mountPropagation").text() not in ("", "None", "HostToContainer"):
            field = mount.child("mountPropagation").path
            findings.append(Finding(Rule.HOST, field, "mounts reach the host", "None", "another propagation"))
    return findings


def judge_security_context(context: Node) -> list[Finding]:
    """A container's or a pod's."""
    findings = []
    if context.child("privileged").flag():
        findings.append(
            Finding(Rule.PRIVILEGE, context.child("privileged").path, "a privileged container", "false", "true")
        )
    for capability in context.at("capabilities", "add").items():
        if capability.text().upper().removeprefix("CAP_") not in _CAPABILITIES:
            expected = ", ".join(_CAPABILITIES) + " at most"
            findings.append(
                Finding(Rule.PRIVILEGE, capability.path, "an added capability", expected, capability.text()[:60])
            )
    if context.at("windowsOptions", "hostProcess").flag():
        field = context.at("windowsOptions", "hostProcess").path
        findings.append(Finding(Rule.HOST, field, "a process of the host", "false", "true"))
    for name in ("seccompProfile", "appArmorProfile"):
        if context.at(name, "type").text() == "Unconfined":
            field = context.at(name, "type").path
            findings.append(Finding(Rule.PRIVILEGE, field, "unconfined", "RuntimeDefault or Localhost", "Unconfined"))
    proc = context.child("procMount")
    if proc.text() not in ("", "Default"):
        findings.append(Finding(Rule.PRIVILEGE, proc.path, "an unmasked /proc", "Default", proc.text()[:60]))
    return findings


def _image(settings: Settings, image: Node) -> list[Finding]:
    pinned = PINNED.fullmatch(image.text())
    if pinned is None:
        shown = image.text()[:200] or "nothing"
        return [Finding(Rule.IMAGE, image.path, "an image that can change under its name", "name@sha256:…", shown)]
    if settings.other_digests is not None and pinned[1] not in settings.other_digests:
        return [Finding(Rule.IMAGE, image.path, "an image that is not listed", "a digest of other_images", pinned[1])]
    return []


def _secrets(settings: Settings, container: Node) -> list[Finding]:
    """Environment variables that hold a key, or anything of a Secret. Values are never shown."""
    findings = []
    for source in container.child("envFrom").items():
        if source.child("secretRef").present:
            expected = "no Secret in the environment"
            findings.append(Finding(Rule.SECRET, source.path, "variables from a Secret", expected, "secretRef"))
    for variable in container.child("env").items():
        name = variable.child("name").text()
        origin = variable.child("valueFrom")
        for kind in sorted(name for name, value in origin.members().items() if value is not None):
            if kind not in _SOURCES:
                expected = f"one of {', '.join(sorted(_SOURCES))}"
                field = origin.child(kind).path
                findings.append(Finding(Rule.SECRET, field, "a variable from a Secret", expected, kind[:60]))
        if settings.names_a_key(name):
            message = "a variable whose name says it is a key"
            expected = "the key released into the worker's memory"
            findings.append(Finding(Rule.SECRET, variable.path, message, expected, name[:80]))
    return findings
