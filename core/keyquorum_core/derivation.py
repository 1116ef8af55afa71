"""The threshold PRF: contributions, the root they combine to, and who answered wrongly (DESIGN §4).

Naor–Pinkas–Reingold (EUROCRYPT 1999) over replicated seeds, as DiSE (Agrawal–Mohassel–Mukherjee–Rindal, CCS 2018)
uses it. A contribution is one HMAC, so a custodian's answer costs one HMAC per seed it holds. Every seed is held by
several custodians, so that answers can be compared, and a wrong one found by whom it contradicts.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.quorum import Quorum
from keyquorum_core.transcript import H, u64be

__all__ = [
    "CONTRIBUTION_SIZE",
    "KEY_CHECK_SIZE",
    "PURPOSES",
    "Combination",
    "Combiner",
    "DerivedKey",
    "Missing",
    "context",
    "contribution",
    "contributions",
    "decode_contributions",
    "encode_contributions",
    "hkdf_sha256",
    "key_check",
    "purpose_key",
    "root",
]

CONTRIBUTION_SIZE = 32
KEY_CHECK_SIZE = 16
PURPOSES = ("bundle", "result", "telemetry", "tokenize", "mapping", "projection", "data")

_CONTRIBUTION_LABEL = b"keyquorum/v1/contribution"
_ENTRY = struct.Struct(">I32s")
_MAX_SEARCH = 2_000_000  # contributions looked at while searching for liars: under a second


def hkdf_sha256(ikm: bytes, *, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA-256 (RFC 5869) of at most one block: ``length`` in 1…32."""
    if not 1 <= length <= 32:
        raise MalformedError(Reason.MALFORMED, "bad HKDF length", expected="1…32", actual=length)
    pseudorandom_key = hmac.digest(salt or bytes(32), ikm, "sha256")
    return hmac.digest(pseudorandom_key, info + b"\x01", "sha256")[:length]


def context(key_id: str, epoch: int, purpose: str, subject: bytes) -> bytes:
    """What a key is derived for: 32 bytes. For a job, purpose is ``job``, subject SHA-256 of the manifest payload."""
    try:
        names = key_id.encode(), purpose.encode()
    except UnicodeEncodeError:
        names = b"", b""
    if not all(names) or not 0 <= epoch < 1 << 64:
        raise MalformedError(
            Reason.MALFORMED, "bad derivation context", expected="a key id, a purpose and an epoch in 0…2⁶⁴-1"
        )
    return H("keyquorum/v1/context", names[0], u64be(epoch), names[1], subject)


def contribution(seed: bytes, context: bytes) -> bytes:
    """HMAC-SHA-256(seed, "keyquorum/v1/contribution" ‖ context): 32 bytes from 32 and 32."""
    _check_size("seed", seed, 32)
    _check_size("context", context, 32)
    return hmac.digest(seed, _CONTRIBUTION_LABEL + context, "sha256")


def contributions(seeds: Mapping[int, bytes], context: bytes) -> dict[int, bytes]:
    """One contribution for each seed a custodian holds, by index."""
    _check_size("context", context, 32)
    for seed in seeds.values():
        _check_size("seed", seed, 32)
    message = _CONTRIBUTION_LABEL + context
    return {index: hmac.digest(seed, message, "sha256") for index, seed in seeds.items()}


def root(contributions: Mapping[int, bytes], context: bytes) -> bytes:
    """HKDF of the XOR over all indices 0…n-1: 32 bytes. Raises :class:`MalformedError` when an index is missing."""
    if not contributions or any(index not in contributions for index in range(len(contributions))):
        raise MalformedError(Reason.MALFORMED, "contributions do not cover all indices from 0")
    _check_size("context", context, 32)
    if any(len(value) != CONTRIBUTION_SIZE for value in contributions.values()):
        raise MalformedError(Reason.MALFORMED, "contribution has the wrong size", expected=f"{CONTRIBUTION_SIZE} bytes")
    total = 0
    for value in contributions.values():
        # Integers only as a fast XOR, at the recipient, over values that serve one context: no seed comes here.
        total ^= int.from_bytes(value, "big")
    return hkdf_sha256(total.to_bytes(32, "big"), salt=context, info=b"keyquorum/v1/root", length=32)


def key_check(root: bytes, context: bytes) -> bytes:
    """16 bytes that tell whether a root is right and reveal nothing else of it. Public."""
    _check_size("root", root, 32)
    return hkdf_sha256(root, salt=context, info=b"keyquorum/v1/key-check", length=KEY_CHECK_SIZE)


def purpose_key(root: bytes, context: bytes, name: str) -> bytes:
    """The 32-byte key for one of ``PURPOSES``. Other names are refused: ``key-check`` would make a public key check."""
    _check_size("root", root, 32)
    if name not in PURPOSES:
        raise MalformedError(Reason.MALFORMED, "unknown key purpose", expected=", ".join(PURPOSES), actual=name[:40])
    return hkdf_sha256(root, salt=context, info=b"keyquorum/v1/" + name.encode(), length=32)


def encode_contributions(contributions: Mapping[int, bytes]) -> bytes:
    """u32be index ‖ 32 bytes, repeated in ascending order of index: the plaintext of a sealed share."""
    out = bytearray()
    for index in sorted(contributions):
        if not 0 <= index < 1 << 32:
            raise MalformedError(Reason.MALFORMED, "bad contribution index", expected="0…2³²-1", actual=index)
        _check_size("contribution", contributions[index], CONTRIBUTION_SIZE)
        out += index.to_bytes(4, "big") + contributions[index]
    return bytes(out)


def decode_contributions(data: bytes, expected_indices: tuple[int, ...]) -> dict[int, bytes]:
    """Read :func:`encode_contributions` with exactly ``expected_indices`` (ascending), else :class:`MalformedError`."""
    if len(data) != _ENTRY.size * len(expected_indices):
        raise MalformedError(
            Reason.MALFORMED,
            "contributions have the wrong size",
            expected=f"{_ENTRY.size * len(expected_indices)} bytes",
            actual=f"{len(data)} bytes",
        )
    out: dict[int, bytes] = dict(_ENTRY.iter_unpack(data))
    if tuple(out) != expected_indices:  # so a repeated index is refused too
        raise MalformedError(
            Reason.MALFORMED,
            "contributions for the wrong seeds",
            expected=_shown(expected_indices),
            actual=_shown(out),
        )
    return out


def _shown(indices: Iterable[int]) -> str:
    return ", ".join(str(index) for index in islice(indices, 20))


def _agree(a: Mapping[int, bytes], b: Mapping[int, bytes]) -> bool:
    """Whether two answers give the same value for every index that both hold."""
    shared = a.keys() & b.keys()
    return hmac.compare_digest(b"".join([a[index] for index in shared]), b"".join([b[index] for index in shared]))


def _check_size(what: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise MalformedError(
            Reason.MALFORMED, f"{what} has the wrong size", expected=f"{size} bytes", actual=f"{len(value)} bytes"
        )


@dataclass(frozen=True, slots=True)
class DerivedKey:
    """A root in its context. ``root`` is secret (32 bytes), ``key_check`` public (16 bytes)."""

    context: bytes
    root: bytes = field(repr=False)
    key_check: bytes

    def purpose_key(self, name: str) -> bytes:
        """The 32-byte key for one of ``PURPOSES``."""
        return purpose_key(self.root, self.context, name)


@dataclass(frozen=True, slots=True)
class Combination:
    """A derived key and who was right.

    ``used`` agree and qualify. ``blamed`` answered wrongly: with a key check met, for certain, as long as the honest
    among those who answered qualify; without one, by the word of two against it. ``suspected`` contradict the others,
    but several explanations are equally good, and in each some of them lied. ``confirmed``: the key check was given and
    met, or at least two of ``used`` report each index.
    """

    key: DerivedKey
    used: tuple[str, ...]
    blamed: tuple[str, ...]
    confirmed: bool
    suspected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there is no combination yet, and whose answers would help; empty ``ask`` means nobody's would."""

    why: str
    ask: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.why}; ask {', '.join(self.ask)}" if self.ask else self.why


class Combiner:
    """Collects answers for one context until they give a key, and names wrong ones (DESIGN §4 "Combine").

    Answers must be authenticated before they come here: blame is only as good as the signature on the answer.

    Two custodians *conflict* when they report different values for one seed. A rest without conflicts that qualifies
    covers every index and so gives one root. With a key check, a rest that meets it gives the true root, and every
    explanation of what happened excludes some set of custodians; only those whom *every* explanation excludes are
    blamed. (Differences that cancel in the XOR can make an honest custodian look as bad as the liar. Such a lie changes
    no key; its author is among the ``suspected``.)
    """

    def __init__(self, quorum: Quorum, context: bytes, key_check: bytes | None = None) -> None:
        _check_size("context", context, 32)
        if key_check is not None:
            _check_size("key check", key_check, KEY_CHECK_SIZE)
        self._quorum = quorum
        self._context = context
        self._key_check = key_check
        self._answers: dict[str, dict[int, bytes]] = {}
        self._bad: dict[str, str] = {}
        self._agreed: dict[int, bytes] = {}  # every value reported, as long as nobody conflicts
        self._conflicts: dict[int, int] = {}  # custodian's bit → mask of those it conflicts with
        self._found: Combination | None = None
        self._current = False
        self._exhausted = False  # the last search stopped at its bound

    def add(self, custodian_id: str, contributions: Mapping[int, bytes]) -> None:
        """Take a custodian's answer.

        An answer with the wrong indices or sizes, or a second one that differs from the first, is not raised but
        recorded: its author is blamed. Raises :class:`MalformedError` for somebody who is not in the committee.
        """
        expected = self._quorum.indices_of(custodian_id)
        earlier = self._answers.get(custodian_id)
        if custodian_id in self._bad:
            return
        if set(contributions) != set(expected):
            self.reject(custodian_id, "wrong set of indices")
        elif any(len(value) != CONTRIBUTION_SIZE for value in contributions.values()):
            self.reject(custodian_id, "contribution of the wrong size")
        elif earlier is None:
            self._take(custodian_id, dict(contributions))
        elif not hmac.compare_digest(encode_contributions(earlier), encode_contributions(contributions)):
            self.reject(custodian_id, "two different answers")

    def reject(self, custodian_id: str, why: str) -> None:
        """Blame a custodian whose signed answer cannot be opened or read; ``why`` is shown, so no secrets."""
        self._quorum.indices_of(custodian_id)
        self._bad.setdefault(custodian_id, why)
        if self._answers.pop(custodian_id, None) is not None:
            remaining, self._answers, self._agreed, self._conflicts = self._answers, {}, {}, {}
            for name, answer in remaining.items():
                self._take(name, answer)
        self._current = False

    def _take(self, custodian_id: str, answer: dict[int, bytes]) -> None:
        # One comparison with all earlier answers at once; with each of them only when somebody disagrees.
        if self._conflicts or not _agree(answer, self._agreed):
            bit = self._quorum.mask([custodian_id])
            for name, other in self._answers.items():
                if not _agree(answer, other):
                    other_bit = self._quorum.mask([name])
                    self._conflicts[other_bit] = self._conflicts.get(other_bit, 0) | bit
                    self._conflicts[bit] = self._conflicts.get(bit, 0) | other_bit
        self._agreed |= answer
        self._answers[custodian_id] = answer
        self._current = False

    @property
    def blamed(self) -> tuple[str, ...]:
        """Whose answers are known to be wrong so far, sorted."""
        found = self.result()
        return found.blamed if found else tuple(sorted(self._bad))

    def result(self, require_confirmed: bool = False) -> Combination | None:
        """The key, or None while more answers are needed (:meth:`missing` says why)."""
        if not self._current:
            self._found = self._search()
            self._current = True
        if self._found is None or (require_confirmed and not self._found.confirmed):
            return None
        return self._found

    def missing(self) -> Missing:
        """Why there is no key, or why the one there is isn't confirmed; meaningless once it is."""
        others = tuple(name for name in self._quorum.ids if name not in self._answers and name not in self._bad)
        found = self.result()
        if found is None and not self._quorum.is_qualified(self._answers):
            return Missing(f"the answers make no quorum: needs {self._quorum.explain_missing(self._answers)}", others)
        if found is None and self._conflicts:
            names = self._names(sum(self._conflicts))
            return Missing(f"{', '.join(names)} contradict each other, and it cannot be told who is right", others)
        if found is None:
            return Missing("the answers agree with each other but do not meet the key check", others)
        counts = self._quorum.holder_counts(self._quorum.mask(found.used))
        single = {index for index, by in enumerate(counts) if by < 2}
        helpful = tuple(name for name in others if not single.isdisjoint(self._quorum.indices_of(name)))
        return Missing(f"{len(single)} of {self._quorum.seed_count} seeds are reported by one custodian only", helpful)

    def conclude(self, require_confirmed: bool = False) -> Combination:
        """The key, when nobody is left to ask.

        Raises :class:`RefusedError`: ``NO_QUORUM`` when too few answered, or too few to confirm; ``BLAME`` when enough
        did, but they contradict each other or the key check.
        """
        found = self.result(require_confirmed)
        if found is not None:
            return found
        missing = self.missing()
        disputed = self._quorum.is_qualified(self._answers) and self.result() is None
        raise RefusedError(
            Reason.BLAME if disputed else Reason.NO_QUORUM,
            missing.why,
            expected=self._quorum.words(),
            actual=f"usable answers from {', '.join(sorted(self._answers)) or 'nobody'}",
            next_step=f"Ask {', '.join(missing.ask)}." if missing.ask else "",
            details={f"blamed.{name}": why for name, why in sorted(self._bad.items())},
        )

    # The search

    def _names(self, mask: int) -> tuple[str, ...]:
        return tuple(name for i, name in enumerate(self._quorum.ids) if mask >> i & 1)

    def _search(self) -> Combination | None:
        answered = self._quorum.mask(self._answers)
        if not self._quorum.is_qualified_mask(answered):
            return None
        rests = list(self._rests(answered))
        if self._key_check is not None:
            return self._best_by_key_check(answered, rests)
        return self._best_by_agreement(answered, rests)

    def _rests(self, answered: int) -> Iterator[int]:
        """Every largest qualified rest without conflicts: the whole, when nobody conflicts.

        A vertex cover search: the custodian with most conflicts goes, or stays and all it conflicts with go. Branches
        that no longer qualify are cut, so the work grows with what liars can still hide, and is bounded besides.
        """
        budget = min(20_000, max(64, _MAX_SEARCH // self._quorum.seed_count))
        seen: set[int] = set()
        pending = [answered]
        while pending and budget:
            budget -= 1
            rest = pending.pop()
            worst, degree = 0, 0
            for bit, others in self._conflicts.items():
                if bit & rest and (others & rest).bit_count() > degree:
                    worst, degree = bit, (others & rest).bit_count()
            if not worst:
                if rest not in seen and self._is_largest(rest, answered):
                    seen.add(rest)
                    yield rest
                continue
            without, beside = rest & ~worst, rest & ~self._conflicts[worst]
            pending += [smaller for smaller in (beside, without) if self._quorum.is_qualified_mask(smaller)]
        self._exhausted = bool(pending)

    def _is_largest(self, rest: int, answered: int) -> bool:
        """Whether nobody can join: a smaller rest gives the same root and would blame more."""
        return not any(
            (answered & ~rest) >> i & 1 and not self._conflicts.get(1 << i, 0) & rest
            for i in range(len(self._quorum.ids))
        )

    def _derive(self, rest: int) -> DerivedKey:
        values = self._agreed
        if self._conflicts:
            values = {}
            for name in self._names(rest):
                values |= self._answers[name]
        secret = root(values, self._context)
        return DerivedKey(self._context, secret, key_check(secret, self._context))

    def _best_by_key_check(self, answered: int, rests: list[int]) -> Combination | None:
        expected = self._key_check or b""
        met: list[tuple[int, DerivedKey]] = []
        for rest in rests:
            key = self._derive(rest)
            if hmac.compare_digest(key.key_check, expected):
                met.append((rest, key))
        if not met:
            return None
        rest, key = max(met, key=lambda pair: pair[0].bit_count())
        always, ever = answered, 0
        for other, _ in met:
            always &= ~other
            ever |= answered & ~other
        if self._exhausted:
            always = 0  # an explanation not looked at might clear somebody
        return self._combination(rest, key, always, ever & ~always, confirmed=True)

    def _best_by_agreement(self, answered: int, rests: list[int]) -> Combination | None:
        if not rests or self._exhausted:
            return None
        most = max(rest.bit_count() for rest in rests)
        best = [rest for rest in rests if rest.bit_count() == most]
        if len(best) > 1:
            return None
        rest = best[0]
        support = self._quorum.holder_counts(rest)  # everyone reports all the seeds it holds
        # One custodian's word against another's decides nothing.
        if any(support[index] < 2 for index in self._disputed()):
            return None
        confirmed = min(support) > 1
        return self._combination(rest, self._derive(rest), answered & ~rest, 0, confirmed=confirmed)

    def _disputed(self) -> set[int]:
        """Indices with more than one value reported."""
        if not self._conflicts:
            return set()
        return {
            index
            for a, b in combinations(self._answers.values(), 2)
            for index in a.keys() & b.keys()
            if not hmac.compare_digest(a[index], b[index])
        }

    def _combination(self, rest: int, key: DerivedKey, wrong: int, doubtful: int, *, confirmed: bool) -> Combination:
        blamed = tuple(sorted({*self._names(wrong), *self._bad}))
        return Combination(key, self._names(rest), blamed, confirmed, self._names(doubtful))
