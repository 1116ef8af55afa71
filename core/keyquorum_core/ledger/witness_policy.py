"""C2SP tlog-policy: whose logs to believe, and which witnesses must have cosigned, as a file.

``log <vkey> [<url>]``, ``witness <name> <vkey> [<url>]``, ``group <name> <k>|all|any <name>…`` and one
``quorum <name>``; names are defined before they are used, and each is a member of at most one group.

Read more strictly than the format asks for, in three ways: every ``log`` line of an origin must have signed, not just
one of them, so that a log's Ed25519 line does not stand without its ML-DSA-44 line; ``quorum none`` is refused, since a
checkpoint that nobody cosigned shows that one reader saw it; and no witness may be a log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.cosignatures import CLOCK_SKEW, Witnessed, witnessed
from keyquorum_core.ledger.log_keys import LogKeys, verify_log_lines
from keyquorum_core.ledger.notes import Note, parse_note
from keyquorum_core.ledger.verifier_keys import SignatureType, VerifierKey

__all__ = ["MAX_LOGS", "MAX_POLICY", "MAX_WITNESSES", "Group", "WitnessPolicy", "WitnessedCheckpoint", "witness_policy"]

MAX_LOGS: Final = 64
MAX_WITNESSES: Final = 64
MAX_GROUPS: Final = 64
MAX_POLICY: Final = 1 << 19

_MAX_TOKEN: Final = 4096
_SPACE: Final = re.compile(r"[ \t]+")
_FORBIDDEN: Final = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)
_LOG_TYPES: Final = (SignatureType.ED25519, SignatureType.ML_DSA_44)
_WITNESS_TYPES: Final = (SignatureType.ED25519_COSIGNATURE, SignatureType.ML_DSA_44)


@dataclass(frozen=True, slots=True)
class Group:
    """Met when at least ``threshold`` of ``members``, witnesses or other groups, are."""

    threshold: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WitnessedCheckpoint:
    """A checkpoint that a policy's log signed and its quorum cosigned. ``times`` holds, by witness of the policy, when
    each current cosignature was made, POSIX seconds."""

    checkpoint: Checkpoint
    note: Note
    times: Mapping[str, int]


class _Reader:
    """What the lines read so far have defined."""

    def __init__(self) -> None:
        self.logs: list[VerifierKey] = []
        self.witnesses: dict[str, VerifierKey] = {}
        self.groups: dict[str, Group] = {}
        self.urls: dict[str, str] = {}
        self.quorum = ""
        self._members: set[str] = set()

    def line(self, items: list[str]) -> None:
        match items:
            case ["log", key, *url] if len(url) <= 1:
                self._log(_vkey(key, _LOG_TYPES, "log"), url)
            case ["witness", name, key, *url] if len(url) <= 1:
                self._witness(name, _vkey(key, _WITNESS_TYPES, "witness"), url)
            case ["group", name, threshold, *members] if members:
                self._group(name, threshold, tuple(members))
            case ["quorum", name]:
                self._quorum(name)
            case _:
                raise _bad("not a line of a policy", "log, witness, group or quorum with what each takes", items[0])

    def _log(self, key: VerifierKey, url: list[str]) -> None:
        if key.public in {known.public for known in self.logs}:
            raise _bad("a log stands twice in the policy", "each key once", key.name)
        if len(self.logs) >= MAX_LOGS:
            raise _too_many("logs", MAX_LOGS)
        self.logs.append(key)
        self.urls.update({key.encode(): item for item in url})

    def _witness(self, name: str, key: VerifierKey, url: list[str]) -> None:
        self._define(name)
        if key.public in {known.public for known in self.witnesses.values()}:
            raise _bad("a witness stands twice in the policy", "each key once", name)
        if len(self.witnesses) >= MAX_WITNESSES:
            raise _too_many("witnesses", MAX_WITNESSES)
        self.witnesses[name] = key
        self.urls.update({key.encode(): item for item in url})

    def _group(self, name: str, threshold: str, members: tuple[str, ...]) -> None:
        self._define(name)
        if len(self.groups) >= MAX_GROUPS:
            raise _too_many("groups", MAX_GROUPS)
        for member in members:
            if member not in self.witnesses and member not in self.groups:
                raise _bad("a group has a member not defined before it", "a witness or group", member)
            if member in self._members:
                raise _bad("a name is a group's member twice", "each name in at most one group, once", member)
            self._members.add(member)
        words = {"all": len(members), "any": 1}
        if threshold not in words and (not _NUMBER.fullmatch(threshold) or int(threshold) > len(members)):
            raise _bad(f"bad threshold of group {name[:64]!a}", f"all, any or 1…{len(members)}", threshold)
        self.groups[name] = Group(words.get(threshold) or int(threshold), members)

    def _define(self, name: str) -> None:
        if name == "none" or name in self.witnesses or name in self.groups:
            raise _bad("a name is defined twice", "a new name, not none", name)

    def _quorum(self, name: str) -> None:
        if self.quorum:
            raise _bad("a policy with two quorums", "one quorum line", name)
        if name == "none":
            raise MalformedError(
                Reason.UNSUPPORTED,
                "a policy that asks for no witness",
                expected="a witness or group",
                actual=name,
                next_step="Name the witnesses whose cosignatures show that others saw the same log.",
            )
        if name not in self.witnesses and name not in self.groups:
            raise _bad("the quorum is not defined before it is named", "a witness or group", name)
        self.quorum = name


@dataclass(frozen=True, slots=True)
class WitnessPolicy:
    """A policy as read by :meth:`parse`. ``urls`` is by vkey; nothing here uses it."""

    logs: tuple[VerifierKey, ...]
    witnesses: Mapping[str, VerifierKey]
    groups: Mapping[str, Group]
    quorum: str
    urls: Mapping[str, str]

    @staticmethod
    def parse(data: bytes) -> WitnessPolicy:
        """Read a policy file. Raises :class:`MalformedError`: ``UNSUPPORTED`` for ``quorum none`` and for keys of other
        types, ``DIGEST`` for a vkey with a wrong key id, ``TOO_LARGE``, else ``MALFORMED``, with the line's number."""
        if len(data) > MAX_POLICY:
            raise MalformedError(
                Reason.TOO_LARGE, "a policy is too large", expected=f"at most {MAX_POLICY} bytes", actual=len(data)
            )
        if not data.endswith(b"\n"):
            raise _bad("a policy is cut short", "a newline after each line", "none after the last")
        if control := _FORBIDDEN.search(data):
            raise _bad("a policy holds a control character", "tabs and newlines only", f"{control[0][0]:#04x}")
        reader = _Reader()
        # Octets over 0x7f are opaque: surrogates stand for those that are not UTF-8; only names of keys refuse them.
        for number, line in enumerate(data.decode("utf-8", "surrogateescape")[:-1].split("\n"), 1):
            items = _SPACE.split(line.strip(" \t"))
            if items == [""] or items[0].startswith("#"):
                continue
            if max(map(len, items)) > _MAX_TOKEN:
                raise _bad(f"line {number} of a policy is over-long", f"items of at most {_MAX_TOKEN}", "a longer one")
            try:
                reader.line(items)
            except MalformedError as error:
                raise MalformedError(
                    error.reason,
                    f"line {number} of a policy: {error.message}",
                    expected=error.expected,
                    actual=error.actual,
                    next_step=error.next_step,
                ) from None
        if not reader.quorum:
            raise _bad("a policy without a quorum", "one quorum line", "none")
        both = {key.public for key in reader.logs} & {key.public for key in reader.witnesses.values()}
        if both:
            raise _bad("a log is its own witness", "other keys for witnesses than for logs", f"{len(both)} shared")
        return WitnessPolicy(tuple(reader.logs), reader.witnesses, reader.groups, reader.quorum, reader.urls)

    def is_met_by(self, witnesses: Set[str]) -> bool:
        """Whether cosignatures of these witnesses (names of the policy; others add nothing) meet the quorum."""
        met = {name for name in witnesses if name in self.witnesses}
        for name, group in self.groups.items():  # members are defined before their group
            if sum(member in met for member in group.members) >= group.threshold:
                met.add(name)
        return self.quorum in met

    def verify(self, data: bytes, *, now: int, oldest: int, skew: int = CLOCK_SKEW) -> WitnessedCheckpoint:
        """A signed checkpoint under this policy: by a log in it, and cosigned by its quorum between ``oldest`` (POSIX
        seconds, 0 for any age) and ``now`` + ``skew``.

        Raises :class:`MalformedError`, and :class:`RefusedError`: ``LEDGER_ORIGIN`` for a log not in the policy,
        ``SIGNATURE_MISSING`` and ``SIGNATURE`` for its lines or any known witness's, then as :meth:`check`.
        """
        note = parse_note(data, "a checkpoint")
        checkpoint = Checkpoint.parse(note.text)
        keys = [key for key in self.logs if key.name == checkpoint.origin]
        if not keys:
            raise RefusedError(
                Reason.LEDGER_ORIGIN,
                "a checkpoint of a log that is not in the policy",
                expected=", ".join(sorted({key.name for key in self.logs}))[:400],
                actual=ascii(checkpoint.origin),
            )
        verify_log_lines(note, checkpoint, keys)
        return WitnessedCheckpoint(checkpoint, note, self.check(note, checkpoint, now=now, oldest=oldest, skew=skew))

    def check(
        self, note: Note, checkpoint: Checkpoint, *, now: int, oldest: int, skew: int = CLOCK_SKEW
    ) -> dict[str, int]:
        """The quorum alone, on a checkpoint whose log lines were verified: when each current witness cosigned.

        Raises :class:`RefusedError`: ``SIGNATURE`` for a known witness's line that does not verify, ``STALE`` when the
        quorum is met only by counting cosignatures that are too old or from the future, ``NO_QUORUM`` otherwise.
        """
        seen = witnessed(
            note, checkpoint, {name: (key,) for name, key in self.witnesses.items()}, now=now, oldest=oldest, skew=skew
        )
        if not self.is_met_by(seen.current.keys()):
            raise self._refusal(seen, now, oldest, skew)
        return dict(seen.current)

    def _refusal(self, seen: Witnessed, now: int, oldest: int, skew: int) -> RefusedError:
        untimely = self.is_met_by({*seen.current, *seen.stale, *seen.early})
        found = [f"{name} at {time}" for part in (seen.current, seen.stale, seen.early) for name, time in part.items()]
        return RefusedError(
            Reason.STALE if untimely else Reason.NO_QUORUM,
            f"not cosigned{' in time' if untimely else ''} by the quorum of witnesses",
            expected=f"{self.quorum[:64]!a}, at {max(oldest, 1)}…{now + skew}",
            actual=ascii(", ".join(found)[:400]) if found else "no cosignature of a known witness",
        )


def witness_policy(log: LogKeys, witnesses: Mapping[str, tuple[VerifierKey, VerifierKey]], threshold: int) -> bytes:
    """A policy file for a log and ``threshold`` of these witnesses, each of which counts when both its keys signed.

    ``witnesses`` is by a name of your choice, keys as :attr:`Cosigner.keys` gives them. Raises :class:`MalformedError`
    as :meth:`WitnessPolicy.parse` does.
    """
    lines = [f"log {key.encode()}" for key in (log.ed25519, log.ml_dsa_44)]
    for name, keys in witnesses.items():
        lines += ["", *(f"witness {name}/{key.type:#04x} {key.encode()}" for key in keys)]
        lines.append(f"group {name} all " + " ".join(f"{name}/{key.type:#04x}" for key in keys))
    lines += ["", f"group witnesses {threshold} " + " ".join(witnesses), "quorum witnesses", ""]
    policy = "\n".join(lines).encode()
    WitnessPolicy.parse(policy)
    return policy


def _vkey(text: str, types: tuple[SignatureType, ...], what: str) -> VerifierKey:
    key = VerifierKey.parse(text)
    if key.type not in types:
        raise MalformedError(
            Reason.UNSUPPORTED,
            f"a {what} can't sign with a key of type {key.type:#04x}",
            expected=", ".join(f"{known:#04x}" for known in types),
            actual=f"{key.type:#04x}",
        )
    return key


def _bad(message: str, expected: str, actual: str) -> MalformedError:
    return MalformedError(Reason.MALFORMED, message, expected=expected, actual=ascii(actual[:80]))


def _too_many(what: str, limit: int) -> MalformedError:
    return MalformedError(Reason.TOO_LARGE, f"too many {what} in a policy", expected=f"at most {limit}")
