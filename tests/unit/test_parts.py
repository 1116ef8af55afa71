"""Parts of a ceremony between custodians: exact bytes, and every way in which a blob or a header can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest

from keyquorum_core.ceremony import PartsHeader, new_parts
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.parts import (
    SealedPart,
    check_header,
    co_holders,
    open_parts,
    parts_header,
    parts_info,
    seal_parts,
    shared_indices,
)
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.transcript import H

QUORUM = Quorum({"at_least": 2}, [Custodian("ch-1", "CH"), Custodian("de-1", "DE"), Custodian("fr-1", "FR")])
PLAN = CeremonyPlan(
    ceremony_id="0123456789abcdef0123456789abcdef",
    key_id="k",
    epoch=1,
    suite="MLKEM768_X25519",
    cluster="demo",
    roster_digest="ab" * 32,
    quorum=QUORUM,
    created_at=1_800_000_000,
)
KEYS = {name: RecipientKey.generate() for name in QUORUM.ids}
PUBLIC = {name: key.public for name, key in KEYS.items()}
PARTS = new_parts(QUORUM, "ch-1")
SEALED = seal_parts(PLAN, "ch-1", PARTS, PUBLIC)
HEADER = parts_header(PLAN, "ch-1", SEALED)


def blob_to(name: str) -> SealedPart:
    return next(part for part in SEALED if part.to == name)


def test_each_co_holder_gets_exactly_the_parts_of_the_seeds_it_shares() -> None:
    check_header(PLAN, HEADER, "ch-1")
    assert co_holders(QUORUM, "ch-1") == ("de-1", "fr-1")
    for name in ("de-1", "fr-1"):
        opened = open_parts(PLAN, HEADER, "ch-1", name, blob_to(name), KEYS[name])
        assert opened == {index: PARTS[index] for index in shared_indices(QUORUM, "ch-1", name)}


def test_the_info_of_a_blob_is_pinned() -> None:
    identity = bytes.fromhex(PLAN.ceremony_id)
    info = parts_info(PLAN.ceremony_id, "a", "b", b"key")
    assert info == H("keyquorum/v1/parts", identity, b"a", b"b", b"key")
    assert info.hex() == "78d497978ef2d773c8b2f274ad690b6b62c55ee37cc1225b5d954052497e8fd5"


def refused(**arguments: Any) -> str:
    name = arguments.get("me", "de-1")
    part = arguments.get("part", blob_to("de-1"))
    with pytest.raises(RefusedError) as caught:
        open_parts(PLAN, arguments.get("header", HEADER), "ch-1", name, part, KEYS[name])
    assert caught.value.reason is Reason.CEREMONY
    assert caught.value.details["custodians"] == "ch-1"
    return caught.value.message


def header_for(part: SealedPart) -> PartsHeader:
    recipients = {**HEADER.recipients, part.to: hashlib.sha256(part.sealed).hexdigest()}
    return dataclasses.replace(HEADER, recipients=recipients)


def test_a_blob_that_the_header_does_not_name_is_refused() -> None:
    sealed = blob_to("de-1").sealed
    changed = dataclasses.replace(blob_to("de-1"), sealed=sealed[:-1] + bytes([sealed[-1] ^ 1]))
    assert "not those its header names" in refused(part=changed)
    assert "not those its header names" in refused(part=blob_to("fr-1"))


def test_a_blob_for_somebody_else_does_not_open_even_with_a_header_to_match() -> None:
    stolen = dataclasses.replace(blob_to("fr-1"), to="de-1")
    assert "cannot be used" in refused(part=stolen, header=header_for(stolen))


@pytest.mark.parametrize("plaintext", [b"", b"\0\0\0\1" + bytes(31), b"\0\0\0\0" + bytes(32), bytes(36 * 3)])
def test_a_blob_with_other_parts_than_the_shared_ones_is_refused(plaintext: bytes) -> None:
    info = parts_info(PLAN.ceremony_id, "ch-1", "de-1", PUBLIC["de-1"])
    part = SealedPart("ch-1", "de-1", seal(PUBLIC["de-1"], plaintext, info))
    assert "cannot be used" in refused(part=part, header=header_for(part))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"custodian": "fr-1"}, "another custodian"),
        ({"plan_digest": "00" * 32}, "another plan"),
        ({"recipients": {"de-1": "01" * 32}}, "wrong recipients"),
        ({"recipients": {**HEADER.recipients, "xx-1": "01" * 32}}, "wrong recipients"),
        ({"recipients": {}}, "wrong recipients"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        check_header(PLAN, dataclasses.replace(HEADER, **change), "ch-1")
