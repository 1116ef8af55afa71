"""Backups and testimonies by the vectors in docs/spec, and as anybody may have spoilt them."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core import testimony
from keyquorum_core.backup import BackupReader, Opening, Statement, open_statement
from keyquorum_core.backup_body import Record, read_records, unpack_seeds
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.roster import Operator, Roster
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from tests.support.fake_custodian import FakeCustodian

ROOT = Path(__file__).resolve().parents[2]
BACKUP, TESTIMONY = (
    json.loads((ROOT / "docs/spec/vectors" / name).read_text()) for name in ("backup.json", "testimony.json")
)
FROZEN = BACKUP["frozen"]
FILE = base64.b64decode(FROZEN["file"])
RECIPIENT = RecipientKey.from_seed_bytes(bytes.fromhex(FROZEN["recipient"]))
SIGNER = Identity.from_seeds(*map(bytes.fromhex, FROZEN["signer_seeds"])).public


def vectors(of: Mapping[str, Any], name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", of[name], ids=lambda vector: vector["name"])


def reason_of(action: Callable[[], object]) -> str:
    """``ok``, or why it is refused; whatever else is raised, passes."""
    try:
        action()
    except KeyquorumError as error:
        return str(error.reason)
    return "ok"


def test_the_vectors_are_what_the_script_makes() -> None:
    script = ROOT / "scripts" / "make_backup_vectors.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


# -- backups -----------------------------------------------------------------------------------------------------------


@vectors(BACKUP, "openings")
def test_openings(vector: dict[str, Any]) -> None:
    payload = vector["payload"].encode()
    assert reason_of(lambda: Opening.parse(payload)) == vector["expect"]
    if vector["expect"] == "ok":
        assert Opening.parse(payload).payload() == payload


@vectors(BACKUP, "statements")
def test_statements(vector: dict[str, Any]) -> None:
    payload = vector["payload"].encode()
    assert reason_of(lambda: Statement.parse(payload)) == vector["expect"]
    if vector["expect"] == "ok":
        statement = Statement.parse(payload)
        assert (statement.payload(), statement.digest) == (payload, vector["sha256"])


@vectors(BACKUP, "bodies")
def test_bodies(vector: dict[str, Any]) -> None:
    def kinds() -> list[str]:
        return [each.kind for each in read_records(io.BytesIO(bytes.fromhex(vector["body"])))]

    if isinstance(vector["expect"], str):
        assert reason_of(kinds) == vector["expect"]
    else:
        assert kinds() == vector["expect"]


@vectors(BACKUP, "seeds")
def test_runs_of_seeds(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["data"])
    if isinstance(vector["expect"], str):
        assert reason_of(lambda: unpack_seeds(data)) == vector["expect"]
    else:
        assert {str(index): seed.hex() for index, seed in unpack_seeds(data).items()} == vector["expect"]


@vectors(BACKUP, "files")
def test_files_without_a_key(vector: dict[str, Any]) -> None:
    data = base64.b64decode(vector["file"])
    assert reason_of(lambda: BackupReader(io.BytesIO(data)).skip()) == vector["expect"]


def test_what_body_and_key_are_bound_to() -> None:
    opening = BackupReader(io.BytesIO(FILE)).opening
    ((_, sealed),) = opening.recipients
    assert RECIPIENT.open(sealed, bytes.fromhex(BACKUP["bindings"]["key"])) == opening.open_key(RECIPIENT)
    assert opening.associated_data().hex() == BACKUP["bindings"]["body"]


def read(data: bytes) -> tuple[list[Record], Statement]:
    reader = BackupReader(io.BytesIO(data))
    records = list(reader.records(RECIPIENT))
    return records, open_statement(reader.envelope, SIGNER)


def test_a_backup_that_an_earlier_release_wrote_is_read() -> None:
    records, statement = read(FILE)
    assert [[each.kind, dict(each.members), each.data.hex()] for each in records] == FROZEN["records"]
    assert statement.payload().decode() == FROZEN["statement"]


def _flipped(data: bytes, at: int, bits: int) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def spoilt(data: bytes) -> st.SearchStrategy[bytes]:
    """Cut, flipped, with a piece twice, with a piece gone, or with something put in."""
    places = st.integers(0, len(data) - 1)
    two = st.tuples(places, places).map(sorted)
    return st.one_of(
        places.map(lambda at: data[:at]),
        st.tuples(places, st.integers(1, 255)).map(
            lambda x: data[: x[0]] + bytes([data[x[0]] ^ x[1]]) + data[x[0] + 1 :]
        ),
        two.map(lambda at: data[: at[1] + 1] + data[at[0] :]),
        two.map(lambda at: data[: at[0]] + data[at[1] + 1 :]),
        st.tuples(places, st.binary(min_size=1, max_size=9)).map(lambda x: data[: x[0]] + x[1] + data[x[0] :]),
    )


@given(spoilt(FILE))
def test_a_spoilt_backup_is_refused_or_says_what_it_said(data: bytes) -> None:
    """The hints beside signatures are nobody's word, and may change."""
    try:
        found = read(data)
    except KeyquorumError:
        return
    assert found == read(FILE)


BODY = next(bytes.fromhex(each["body"]) for each in BACKUP["bodies"] if each["name"] == "in order")


@given(spoilt(BODY))
def test_a_spoilt_body_raises_nothing_else(data: bytes) -> None:
    reason_of(lambda: list(read_records(io.BytesIO(data))))


# -- testimonies -------------------------------------------------------------------------------------------------------


@vectors(TESTIMONY, "testimonies")
def test_testimonies(vector: dict[str, Any]) -> None:
    payload = vector["payload"].encode()
    assert reason_of(lambda: testimony.Testimony.parse(payload)) == vector["expect"]
    if vector["expect"] == "ok":
        assert testimony.Testimony.parse(payload).payload() == payload


@vectors(TESTIMONY, "sufficient")
def test_who_suffices(vector: dict[str, Any]) -> None:
    quorum = Quorum(vector["rule"], [Custodian(*each) for each in TESTIMONY["committee"]])
    assert testimony.suffices(quorum, "ch-1", vector["proved"], vector["unproved"]) is vector["sufficient"]


@pytest.fixture(scope="module")
def committee() -> dict[str, FakeCustodian]:
    return {name: FakeCustodian(name, law, 7001 + at) for at, (name, law) in enumerate(TESTIMONY["committee"])}


@pytest.fixture(scope="module")
def roster(committee: dict[str, FakeCustodian]) -> Roster:
    return Roster(
        cluster="demo",
        version=2,
        issued_at=1,
        expires_at=1 << 40,
        committee="main",
        custodians=tuple(each.roster_entry() for each in committee.values()),
        quorum=TESTIMONY["rule"],
        operators=(Operator("root", Identity.generate().public),),
        operator_threshold=1,
        coordinator_tls=(next(iter(committee.values())).tls.certificate.decode(),),
        log_key=LogSigner.generate("demo/ledger").keys,
        previous="4e" * 32,
    )


ATTACKER = Identity.generate()


def judged(vector: Mapping[str, Any], committee: dict[str, FakeCustodian], roster: Roster) -> testimony.Proof:
    def signed(by: str, payload: str) -> bytes:
        said = testimony.Testimony.parse(payload.encode())
        return testimony.sign_testimony(said, committee[by].identity if by in committee else ATTACKER)

    return testimony.judge(
        [signed(each["by"], each["payload"]) for each in vector["given"]],
        subject=TESTIMONY["subject"],
        nonce=bytes.fromhex(TESTIMONY["nonce"]),
        now=TESTIMONY["now"],
        roster=roster,
        known=testimony.Testimony.parse(TESTIMONY["mine"].encode()).known,
    )


@vectors(TESTIMONY, "judgements")
def test_judgements(vector: dict[str, Any], committee: dict[str, FakeCustodian], roster: Roster) -> None:
    assert reason_of(lambda: judged(vector, committee, roster)) == vector["expect"]
    if vector["expect"] != "ok":
        return
    proof = judged(vector, committee, roster)
    assert {
        "testified": list(proof.testified),
        "retire": [[*where, at] for where, at in proof.retire.items()],
        "withhold": [[*where, list(names)] for where, names in proof.withhold.items()],
        "lacking": [list(where) for where in proof.lacking],
    } == vector["proof"]


def test_a_roster_of_the_attacker_s_own_custodians_knows_no_peer(
    committee: dict[str, FakeCustodian], roster: Roster
) -> None:
    """Of the same names, with other keys. That he can't have it take another roster is the operators' signatures'."""
    theirs = {name: FakeCustodian(name, each.jurisdiction, 7001) for name, each in committee.items()}
    (good,) = (each for each in TESTIMONY["judgements"] if each["name"] == "nothing newer")
    assert reason_of(lambda: judged(good, theirs, roster)) == "SIGNATURE"


@given(st.data())
def test_a_spoilt_testimony_raises_nothing_else(data: st.DataObject) -> None:
    payload = next(each for each in TESTIMONY["testimonies"] if each["expect"] == "ok")["payload"].encode()
    reason_of(lambda: testimony.Testimony.parse(data.draw(spoilt(payload))))


def _values(document: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(document, dict | list):
        members = document.items() if isinstance(document, dict) else enumerate(document)
        for name, value in members:
            yield from _values(value, (*path, name))


def _with(document: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    out = dict(document) if isinstance(document, dict) else list(document)
    out[path[0]] = _with(document[path[0]], path[1:], value)
    return out


EMPTY: list[Any] = [None, "", 0, False, [], {}, [None]]
PARSERS: list[tuple[str, Callable[[bytes], object]]] = [
    (BACKUP["openings"][0]["payload"], Opening.parse),
    (BACKUP["statements"][0]["payload"], Statement.parse),
    (TESTIMONY["testimonies"][0]["payload"], testimony.Testimony.parse),
]


@pytest.mark.parametrize(("payload", "parse"), PARSERS, ids=["opening", "statement", "testimony"])
def test_an_empty_value_of_another_type_is_refused_everywhere(payload: str, parse: Callable[[bytes], object]) -> None:
    """And one of the same type either means something, as no epochs, or is refused."""
    document = json.loads(payload)
    meaningful = {"epochs", "documents", "ledger_size", "restored", "body_bytes", "created_at", "highest_time", "time"}
    meaningful |= {"ledger log", "ledger root", "ledger size", "seeds", "retired_at"}
    for path in _values(document):
        for value in EMPTY:
            changed = _with(document, path, value)
            if changed == document and type(value) is type(document):
                continue
            data = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
            if reason_of(lambda data=data: parse(data)) == "ok":  # type: ignore[misc]
                name = " ".join(path) if path[:1] != ("epochs",) else path[-1]
                assert name in meaningful, (path, value)
