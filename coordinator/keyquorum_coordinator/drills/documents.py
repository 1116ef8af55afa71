"""The operators' two documents of a *revocation* drill: they revoke the drill's owner, lift it, and do nothing else."""

from __future__ import annotations

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.revocations import Revocations

__all__ = ["check_documents", "missing"]


def check_documents(current: Revocations, revoke: Revocations, lift: Revocations, fingerprint: str) -> None:
    """``revoke`` follows what is in force and adds the owner with this fingerprint; ``lift`` follows that and takes it
    out again. Raises :class:`RefusedError` (``BULLETIN``) for documents that do anything else."""
    name = ("owner", fingerprint)
    others = dict(current.revoked)
    wanted = (
        ("the first document's version", current.version + 1, revoke.version),
        ("the second document's version", current.version + 2, lift.version),
        ("whether the first document revokes the drill's owner", True, name in revoke.revoked),
        ("what else the first document revokes", others, {k: v for k, v in revoke.revoked.items() if k != name}),
        ("what is revoked after the second document", others, dict(lift.revoked)),
        ("whether the drill's owner is revoked already", False, name in current.revoked),
    )
    for what, expected, actual in wanted:
        if expected != actual:
            raise RefusedError(
                Reason.BULLETIN,
                f"the drill's revocations would do something else: {what}",
                expected=str(expected)[:200],
                actual=str(actual)[:200],
                next_step="Run it again: the client makes both documents from the revocations in force",
            )


def missing() -> RefusedError:
    """Nobody signed."""
    return RefusedError(
        Reason.SIGNATURE_MISSING,
        "a revocation is for operators to sign, and this drill came without their documents",
        expected="documents that revoke the drill's owner and lift it again",
        next_step="keyquorum drill run revocation, with --operator-key where the roster asks for several",
    )
