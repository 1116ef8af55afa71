"""What custodians testify to one that was restored from a backup, and what it makes of that (docs/spec/backup.md).

A backup is a memory of some past moment. Before the custodian that was restored from one serves anything, it asks what
has happened since of those who were there: each signs what it knows of epochs, documents and the ledger, in answer to a
fresh nonce. Whoever carries the testimonies may keep some back, but :func:`judge` takes only a set of authors that is a
quorum and that every other quorum has a member in: whatever a quorum ever cosigned, one of them saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.names import CUSTODIAN_ID, KEY_ID, SHA256_HEX, check, within
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster
from keyquorum_core.signing import Identity, Unverified, sign
from keyquorum_core.strictjson import Fields, canonical

__all__ = [
    "MAX_TESTIMONY",
    "NONCE_BYTES",
    "NONCE_LIFETIME",
    "TESTIMONY_SKEW",
    "TESTIMONY_TYPE",
    "Known",
    "KnownEpoch",
    "Proof",
    "Testimony",
    "judge",
    "sign_testimony",
    "suffices",
]

TESTIMONY_TYPE: Final = "application/vnd.keyquorum.testimony.v1+json"
NONCE_BYTES: Final = 32
NONCE_LIFETIME: Final = 120
"""Seconds for which a restored custodian takes testimonies to one nonce."""
TESTIMONY_SKEW: Final = 60
MAX_TESTIMONY: Final = 4 << 20
_MAX_EPOCHS: Final = 8192
_MAX_DOCUMENTS: Final = 64
_MAX_TESTIMONIES: Final = 256
_STATES: Final = ("active", "retired", "destroyed")


@dataclass(frozen=True, slots=True)
class KnownEpoch:
    """An epoch by the digest of its certificate (hex); ``retired_at`` is 0 while it is not."""

    state: str
    certificate: str
    retired_at: int = 0

    def __post_init__(self) -> None:
        check(SHA256_HEX, self.certificate, "certificate's digest")
        within(self.retired_at, "retired_at")
        if self.state not in _STATES:
            raise MalformedError(Reason.MALFORMED, "bad state of an epoch", actual=ascii(self.state[:40]))
        if self.state != "destroyed" and (self.state == "retired") != (self.retired_at > 0):
            raise MalformedError(
                Reason.MALFORMED, f"an epoch is {self.state}, and retired at {self.retired_at}", expected="what fits"
            )


@dataclass(frozen=True, slots=True)
class Known:
    """What one custodian knows. ``epochs`` by (key, number), destroyed ones too; ``documents``: version and digest of
    the last accepted of each kind that the cluster's operators sign; ``log``: hex SHA-256 of the encoded keys of the
    ledger that it follows (empty: none), of which it accepted ``ledger_size`` leaves with ``ledger_root`` (hex)."""

    roster_version: int
    roster_digest: str
    epochs: Mapping[tuple[str, int], KnownEpoch]
    documents: Mapping[str, tuple[int, str]]
    log: str = ""
    ledger_size: int = 0
    ledger_root: str = ""

    def __post_init__(self) -> None:
        within(self.roster_version, "roster version", 1)
        check(SHA256_HEX, self.roster_digest, "roster digest")
        within(self.ledger_size, "size of the ledger")
        for digest in (self.log, self.ledger_root, *(digest for _, digest in self.documents.values())):
            if digest:
                check(SHA256_HEX, digest, "digest")
        if bool(self.ledger_size) != bool(self.ledger_root) or (self.ledger_size and not self.log):
            raise MalformedError(
                Reason.MALFORMED,
                "leaves without their root or their log, or a root without leaves",
                expected="all of them, or neither size nor root",
                actual=f"{self.ledger_size} leaves, root {self.ledger_root or 'none'}, log {self.log or 'none'}",
            )
        for key_id, epoch in self.epochs:
            check(KEY_ID, key_id, "key id")
            within(epoch, "epoch", 1)
        for version, _ in self.documents.values():
            within(version, "version", 1)


@dataclass(frozen=True, slots=True)
class Testimony:
    """``custodian`` says to ``subject``, at ``time`` (unix seconds by its clock) and in answer to ``nonce`` (hex), what
    it knows. ``restored``: it was restored from a backup itself and has not proved itself yet."""

    custodian: str
    subject: str
    nonce: str
    time: int
    restored: bool
    known: Known = field(repr=False)

    def __post_init__(self) -> None:
        check(CUSTODIAN_ID, self.custodian, "custodian id")
        check(CUSTODIAN_ID, self.subject, "custodian id")
        check(SHA256_HEX, self.nonce, "nonce")
        within(self.time, "time")

    def payload(self) -> bytes:
        """RFC 8785 JSON of type :data:`TESTIMONY_TYPE`."""
        known = self.known
        return jcs.dumps(
            {
                "custodian": self.custodian,
                "documents": {
                    kind: {"digest": digest, "version": version} for kind, (version, digest) in known.documents.items()
                },
                "epochs": [
                    {
                        "certificate": each.certificate,
                        "epoch": epoch,
                        "key_id": key_id,
                        "retired_at": each.retired_at,
                        "state": each.state,
                    }
                    for (key_id, epoch), each in sorted(known.epochs.items())
                ],
                "ledger": {"log": known.log, "root": known.ledger_root, "size": known.ledger_size},
                "nonce": self.nonce,
                "restored": self.restored,
                "roster": {"digest": known.roster_digest, "version": known.roster_version},
                "subject": self.subject,
                "time": self.time,
            }
        )

    @staticmethod
    def parse(data: bytes) -> Testimony:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        fields = canonical(data, "testimony", MAX_TESTIMONY)
        epochs: dict[tuple[str, int], KnownEpoch] = {}
        last = ("", 0)
        for value in fields.list("epochs", max_items=_MAX_EPOCHS):
            entry = Fields(value, "testimony")
            where = entry.text("key_id"), entry.integer("epoch")
            if where <= last:
                raise MalformedError(Reason.MALFORMED, "a testimony's epochs are not in order, each once")
            epochs[where] = KnownEpoch(entry.text("state"), entry.text("certificate"), entry.integer("retired_at"))
            last = where
            entry.done()
        members, documents = fields.object("documents"), {}
        for kind in members.names()[: _MAX_DOCUMENTS + 1]:
            document = members.object(kind)
            documents[kind] = document.integer("version"), document.text("digest")
            document.done()
        members.done()
        roster, ledger = fields.object("roster"), fields.object("ledger")
        known = Known(
            roster.integer("version"),
            roster.text("digest"),
            epochs,
            documents,
            ledger.text("log", allow_empty=True),
            ledger.integer("size"),
            ledger.text("root", allow_empty=True),
        )
        testimony = Testimony(
            custodian=fields.text("custodian"),
            subject=fields.text("subject"),
            nonce=fields.text("nonce"),
            time=fields.integer("time"),
            restored=fields.boolean("restored"),
            known=known,
        )
        for each in (roster, ledger, fields):
            each.done()
        return testimony


def sign_testimony(testimony: Testimony, identity: Identity) -> bytes:
    """DSSE envelope by the custodian that testifies."""
    return sign(identity, TESTIMONY_TYPE, testimony.payload())


@dataclass(frozen=True, slots=True)
class Proof:
    """What follows from testimonies that suffice: by whom; epochs to retire, with since when; epochs to withhold, since
    somebody says that they are destroyed, with who does; epochs that others hold and the subject lacks."""

    testified: tuple[str, ...]
    retire: Mapping[tuple[str, int], int]
    withhold: Mapping[tuple[str, int], tuple[str, ...]]
    lacking: tuple[tuple[str, int], ...]


def suffices(quorum: Quorum, subject: str, proved: Sequence[str], unproved: Sequence[str] = ()) -> bool:
    """Whether what these know together is all that a quorum may have agreed on without the subject's backup.

    ``proved`` are a quorum, so that one of them is honest, and those who did not testify are none, even with the
    subject as it was: whatever a quorum did, one of these was there. Where the rule allows for no such set, everybody
    else does, including the ``unproved``, who were restored themselves: nobody is left who could know more.
    """
    everyone = set(quorum.ids)
    if everyone - {subject} <= {*proved, *unproved}:
        return True
    return quorum.is_qualified(proved) and not quorum.is_qualified(everyone - set(proved))


def judge(envelopes: Sequence[bytes], *, subject: str, nonce: bytes, now: int, roster: Roster, known: Known) -> Proof:
    """What a restored custodian, that knows ``known``, makes of these testimonies. Pure; changes nothing.

    Raises :class:`MalformedError`; ``SIGNATURE…``, ``UNKNOWN_CUSTODIAN`` (not of the roster), and :class:`RefusedError`
    or :class:`StateError` with ``RESTORED``: another's or an old testimony, one author twice, too few; or something
    that somebody knows and the subject does not, naming both. The second kind may pass when that was brought.
    """
    if len(envelopes) > _MAX_TESTIMONIES:
        raise MalformedError(Reason.TOO_LARGE, "too many testimonies", expected=f"at most {_MAX_TESTIMONIES}")
    given = _open(envelopes, subject, nonce, now, roster)
    quorum = roster.quorum_of()
    proved = sorted(name for name, each in given.items() if not each.restored)
    unproved = sorted(given.keys() - set(proved))
    if not suffices(quorum, subject, proved, unproved):
        raise StateError(
            Reason.RESTORED,
            "too few custodians testified to what happened since the backup",
            expected=f"a quorum ({quorum.words()}) that no other quorum is without a member of, or everybody else",
            actual=", ".join([*proved, *(f"{name} (restored itself)" for name in unproved)]) or "none",
            next_step="Bring the other custodians back; one that stays away the operators take out of the roster.",
        )
    for name, each in given.items():
        _check_roster(name, each.known, known)
        _check_ledger(name, each.known, known)
        _check_documents(name, each.known, known)
    return _epochs(given, known)


def _open(envelopes: Sequence[bytes], subject: str, nonce: bytes, now: int, roster: Roster) -> dict[str, Testimony]:
    given: dict[str, Testimony] = {}
    for envelope in envelopes:
        unverified = Unverified(envelope, TESTIMONY_TYPE, "testimony", 2 * MAX_TESTIMONY)
        testimony = Testimony.parse(unverified.payload)
        name = testimony.custodian
        unverified.open(roster.custodian(name).identity, f"the testimony of {name}")
        for what, expected, actual in (
            ("somebody else", subject, testimony.subject),
            ("another question", nonce.hex(), testimony.nonce),
        ):
            if expected != actual:
                raise _refused(f"{name} testified to {what}", expected, actual)
        if abs(testimony.time - now) > NONCE_LIFETIME + TESTIMONY_SKEW:
            raise _refused(f"the testimony of {name} is not of this moment", now, testimony.time)
        if name == subject:
            raise _refused(f"{name} testified for itself", "another custodian", name)
        if name in given:
            raise _refused(f"{name} testified twice", "each once", name)
        given[name] = testimony
    return given


def _check_roster(name: str, theirs: Known, mine: Known) -> None:
    if theirs.roster_version < mine.roster_version:
        return  # it has not followed yet; its keys are those of the newer one
    if (theirs.roster_version, theirs.roster_digest) != (mine.roster_version, mine.roster_digest):
        raise _behind(
            name,
            "roster",
            f"version {theirs.roster_version}, {theirs.roster_digest}",
            f"version {mine.roster_version}, {mine.roster_digest}",
            "Install the newest roster, and restart.",
        )


def _check_ledger(name: str, theirs: Known, mine: Known) -> None:
    if theirs.log != mine.log:
        if theirs.roster_version < mine.roster_version:
            return  # the log of the roster before
        raise _refused(f"{name} follows another ledger", mine.log or "none", theirs.log or "none")
    if theirs.ledger_size > mine.ledger_size:
        raise _behind(
            name,
            "ledger",
            f"{theirs.ledger_size} leaves",
            f"{mine.ledger_size} leaves",
            "A coordinator shows it the rest, with a proof that it extends what the backup knew.",
        )
    if theirs.ledger_size and theirs.ledger_size == mine.ledger_size and theirs.ledger_root != mine.ledger_root:
        raise _refused(
            f"{name} saw another ledger of that size: one of two forks", mine.ledger_root, theirs.ledger_root
        )


def _check_documents(name: str, theirs: Known, mine: Known) -> None:
    for kind, (version, digest) in sorted(theirs.documents.items()):
        own = mine.documents.get(kind, (0, ""))
        if version > own[0]:
            raise _behind(
                name,
                kind,
                f"version {version}, {digest}",
                f"version {own[0]}" if own[0] else "none",
                f"Bring that {kind}: `keyquorum-custodian bulletin accept`.",
            )
        if version == own[0] and digest != own[1]:
            raise _refused(f"{name} accepted another {kind} of version {version}", own[1], digest)


def _epochs(given: Mapping[str, Testimony], mine: Known) -> Proof:
    retire: dict[tuple[str, int], int] = {}
    withhold: dict[tuple[str, int], list[str]] = {}
    lacking: set[tuple[str, int]] = set()
    for name, testimony in sorted(given.items()):
        for where, theirs in testimony.known.epochs.items():
            own = mine.epochs.get(where)
            if own is None:
                if theirs.state != "destroyed":
                    lacking.add(where)
                continue
            if own.certificate != theirs.certificate:
                raise _refused(
                    f"{name} knows epoch {where[1]} of key {where[0]} by another certificate",
                    own.certificate,
                    theirs.certificate,
                )
            if own.state == "destroyed":
                continue
            if theirs.state == "destroyed":
                withhold.setdefault(where, []).append(name)
            elif theirs.state == "retired" and own.state == "active":
                retire[where] = min(theirs.retired_at, retire.get(where, theirs.retired_at))
    return Proof(
        tuple(sorted(given)), retire, {where: tuple(names) for where, names in withhold.items()}, tuple(sorted(lacking))
    )


def _behind(name: str, subject: str, theirs: object, mine: object, next_step: str) -> StateError:
    return StateError(
        Reason.RESTORED,
        f"{name} knows a newer {subject} than this custodian was restored with",
        expected=theirs,
        actual=mine,
        next_step=next_step,
        details={"peer": name, "subject": subject},
    )


def _refused(message: str, expected: object, actual: object) -> RefusedError:
    return RefusedError(Reason.RESTORED, message, expected=expected, actual=actual)
