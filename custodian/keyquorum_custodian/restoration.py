"""How a restored custodian proves to itself that it serves nothing old, and what its peers say to it for that.

A coordinator carries the question and the answers, and could change, delay, repeat or withhold any of it; what it may
do by that is to keep this custodian from serving. The rules are core's (:func:`keyquorum_core.testimony.judge`). The
custodian's own memory goes forward by the ordinary ways only: checkpoints with proofs that they extend the one in the
backup, documents that the operators signed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.certified import peek_certificate
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError
from keyquorum_core.roster import Roster
from keyquorum_core.signing import Identity
from keyquorum_core.testimony import (
    NONCE_BYTES,
    NONCE_LIFETIME,
    Known,
    KnownEpoch,
    Proof,
    Testimony,
    judge,
    sign_testimony,
)
from keyquorum_custodian.approvals import Approvals
from keyquorum_custodian.bulletins import Bulletins
from keyquorum_custodian.epochs import Epochs
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.logs import logger
from keyquorum_custodian.seed_records import DESTROYED
from keyquorum_custodian.standing import Standing, write_mark
from keyquorum_custodian.witness import Witness

__all__ = ["Restoration"]

_QUESTIONS: Final = 8  # open at a time: coordinators may be several
_MAX_DOCUMENTS: Final = 64
_MAX_HANDED: Final = 40 << 20  # bytes of documents in one answer


class Restoration:
    """One custodian's part, as the one restored and as a peer; used from the keystore's thread. ``kinds``: of the
    documents that the cluster's operators sign, which all custodians accept alike. ``clock`` gives unix seconds."""

    def __init__(
        self,
        me: str,
        identity: Identity,
        roster: Roster,
        *,
        keystore: Keystore,
        standing: Standing,
        approvals: Approvals,
        bulletins: Bulletins,
        kinds: Sequence[str],
        epochs: Epochs,
        witness: Witness,
        clock: Callable[[], float],
        rng: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._me = me
        self._identity = identity
        self._roster = roster
        self._keystore = keystore
        self._standing = standing
        self._approvals = approvals
        self._bulletins = bulletins
        self._kinds = tuple(kinds)
        self._epochs = epochs
        self._witness = witness
        self._clock = clock
        self._rng = rng
        self._questions: OrderedDict[bytes, int] = OrderedDict()
        self._digests: dict[str, str] = {}

    # -- as the one restored ---------------------------------------------------------------------------------------

    def challenge(self) -> tuple[bytes, dict[str, int]]:
        """A fresh nonce for peers to answer, and the versions of the documents that are here.

        Raises ``STATE`` where there is nothing to prove, ``APPROVAL`` until the operator approved the restore.
        """
        self._require_approved()
        nonce = self._rng(NONCE_BYTES)
        self._questions[nonce] = int(self._clock())
        while len(self._questions) > _QUESTIONS:
            self._questions.popitem(last=False)
        return nonce, {kind: version for kind, (version, _) in self._documents().items()}

    def vouch(self, nonce: bytes, testimonies: Sequence[bytes], documents: Sequence[bytes] = ()) -> Proof:
        """Serve from now on, if what peers testify in answer to ``nonce`` leaves nothing to fear.

        ``documents`` are accepted first, those that the operators signed. Raises as :meth:`challenge` and as
        :func:`judge`; ``STALE`` for a nonce that is not open; ``STORAGE``; then nothing changed but documents accepted.
        """
        self._require_approved()
        now = int(self._clock())
        asked_at = next((at for known, at in self._questions.items() if hmac.compare_digest(known, nonce)), None)
        if asked_at is None or not 0 <= now - asked_at <= NONCE_LIFETIME:
            raise RefusedError(
                Reason.STALE,
                "the testimonies do not answer a question of this custodian's that is open",
                expected=f"a nonce given out in the last {NONCE_LIFETIME} s",
                actual="unknown" if asked_at is None else f"{now - asked_at} s old",
                next_step="Ask for a new one.",
            )
        self._accept(documents)
        proof = judge(testimonies, subject=self._me, nonce=nonce, now=now, roster=self._roster, known=self.known())
        self._take(proof, now)
        self._questions.clear()
        return proof

    def _require_approved(self) -> None:
        mark = self._standing.mark
        if mark is None or not self._standing.restored:
            raise StateError(
                Reason.STATE,
                "this custodian has nothing to prove",
                expected="one that was restored from a backup",
                actual="serving",
            )
        self._approvals.require(mark.request_id, mark.statement)

    def _accept(self, documents: Iterable[bytes]) -> None:
        for envelope in list(documents)[:_MAX_DOCUMENTS]:
            with contextlib.suppress(KeyquorumError):  # judged without it, then
                if peek_bulletin(envelope).kind in self._kinds:
                    self._bulletins.accept(envelope)

    def _take(self, proof: Proof, now: int) -> None:
        mark = self._standing.mark
        assert mark is not None  # noqa: S101 - _require_approved
        proved = dataclasses.replace(mark, proved_at=max(1, now), withheld=proof.withhold)
        with self._keystore.transaction():
            for (key_id, epoch), retired_at in proof.retire.items():
                self._keystore.change(
                    "UPDATE epochs SET state = 'retired', retired_at = ? WHERE key_id = ? AND epoch = ?"
                    " AND state = 'active'",
                    retired_at,
                    key_id,
                    epoch,
                )
            write_mark(self._keystore, proved)
        for key_id, epoch in proof.withhold:
            self._epochs.remove(key_id, epoch)
        for held in self._epochs.all():
            if (held.key_id, held.epoch) in proof.retire:
                held.retired_at = proof.retire[held.key_id, held.epoch]
        self._standing.proved(proved)
        logger().warning(
            "RESTORED CUSTODIAN PROVED: it serves from now on",
            testified=list(proof.testified),
            retired=[f"{key_id} epoch {epoch}" for key_id, epoch in proof.retire],
            withheld=[f"{key_id} epoch {epoch}" for key_id, epoch in proof.withhold],
            lacking=[f"{key_id} epoch {epoch}" for key_id, epoch in proof.lacking],
        )

    # -- as a peer -------------------------------------------------------------------------------------------------

    def testify(self, subject: str, nonce: bytes, documents: Mapping[str, int]) -> tuple[bytes, list[bytes]]:
        """What this custodian knows, signed (DSSE envelope), and the operators' documents newer than ``documents``.

        Raises ``UNKNOWN_CUSTODIAN`` for a subject that the roster does not name, :class:`MalformedError`.
        """
        self._roster.custodian(subject)
        if subject == self._me or len(nonce) != NONCE_BYTES:
            raise MalformedError(
                Reason.MALFORMED,
                "testimony is asked for by another custodian, with a nonce",
                expected=f"{NONCE_BYTES} bytes",
                actual=f"{len(nonce)} bytes from {subject}",
            )
        now = int(self._clock())
        said = Testimony(self._me, subject, nonce.hex(), now, self._standing.restored, self.known())
        handed: list[bytes] = []
        for kind in self._kinds:
            row = self._keystore.bulletin(kind)
            if (
                row is not None
                and row[0] > documents.get(kind, 0)
                and sum(map(len, handed)) + len(row[2]) <= _MAX_HANDED
            ):
                handed.append(row[2])
        return sign_testimony(said, self._identity), handed

    # -- what it knows ---------------------------------------------------------------------------------------------

    def known(self) -> Known:
        """Of epochs, documents and the ledger, as the keystore has it."""
        epochs = {
            (row.key_id, row.epoch): KnownEpoch(
                DESTROYED if (row.key_id, row.epoch) in self._standing.withheld else row.state,
                self._digest(row.ceremony_id, row.certificate),
                row.retired_at or 0,
            )
            for row in self._keystore.epochs()
        }
        size = self._witness.size
        return Known(
            self._roster.version,
            self._roster.digest,
            epochs,
            self._documents(),
            self._witness.log,
            size,
            self._witness.root.hex() if size else "",
        )

    def _documents(self) -> dict[str, tuple[int, str]]:
        self._bulletins.refresh()
        found = {kind: self._keystore.bulletin(kind) for kind in self._kinds}
        return {kind: (row[0], row[1]) for kind, row in found.items() if row is not None}

    def _digest(self, ceremony_id: str, certificate: bytes) -> str:
        if ceremony_id not in self._digests:
            self._digests[ceremony_id] = peek_certificate(certificate).digest
        return self._digests[ceremony_id]
