"""The operator's side of policies: putting a signed bundle or list where the custodian finds it, and its clock right.

Both work on a custodian that does not run; one that does is asked instead (``bulletin accept`` on its own listener).
"""

from __future__ import annotations

import time
from pathlib import Path

from keyquorum_core.bulletin import Bulletin, Kind, peek_bulletin, verify_bulletin
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.policy.facts import Seat
from keyquorum_core.revocations import REVOCATIONS
from keyquorum_custodian.bulletins import replace_file
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import open_keystore
from keyquorum_custodian.policy import policy_kinds
from keyquorum_custodian.trust import load_operators

__all__ = ["forget_time", "leave_document"]


def leave_document(directory: Path, envelope: bytes) -> Bulletin:
    """Verify a policy bundle, a list or revocations as the custodian will, and leave it for its next start.

    Raises what the custodian would refuse it for, but for an older version, which only its keystore knows; ``STORAGE``.
    """
    config = load_config(directory)
    kinds: dict[str, Kind[object]] = {
        kind.name: kind for kind in policy_kinds(Seat("custodian", config.id, config.jurisdiction))
    }
    claimed = peek_bulletin(envelope)
    if claimed.kind not in kinds and claimed.kind != REVOCATIONS.name:
        raise RefusedError(
            Reason.BULLETIN,
            "neither a policy, nor a list, nor revocations",
            expected=", ".join(sorted([*kinds, REVOCATIONS.name])),
            actual=claimed.kind,
        )
    if claimed.kind == REVOCATIONS.name:
        kinds[claimed.kind] = REVOCATIONS
        signers = load_operators(config.path(config.operators))
    else:
        signers = load_operators(config.path(config.policy_signers), "the file of policy signers")
    bulletin = verify_bulletin(envelope, claimed.kind, signers.identities, signers.threshold, cluster=config.cluster)
    bulletin.check_time(int(time.time()))
    kinds[claimed.kind].read(bulletin)
    target = config.path(config.bulletins) / f"{claimed.kind}.json"
    try:
        replace_file(target, envelope)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{target} could not be written", actual=error.strerror) from None
    return bulletin


def forget_time(directory: Path, passphrase: str) -> tuple[int, int]:
    """Take the machine's clock as right, though it once showed a later time: returns that time, and the present one.

    For a clock that was ahead by mistake. Documents that expired in between count again, which is why only somebody
    with the passphrase can do it, and only while the custodian is stopped. Raises as :meth:`Keystore.open`.
    """
    store = open_keystore(load_config(directory), passphrase)
    try:
        before, now = store.highest_time(), int(time.time())
        store.save_highest_time(now)
        return before, now
    finally:
        store.close()
