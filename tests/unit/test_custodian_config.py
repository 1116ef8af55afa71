"""custodian.toml, the files of trust beside it, and init: strict reading, whole writing."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.roster import open_card
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.config import CustodianConfig, load_config, render_config
from keyquorum_custodian.init import initialise
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.quota import Quota
from keyquorum_custodian.trust import Owners, add_owner, load_operators
from keyquorum_protos.wire.ports import parse_address

NOW = 1_700_000_000
ALICE = Identity.generate()


def config(directory: Path, **changes: str) -> CustodianConfig:
    members = {"id": "ch-1", "jurisdiction": "CH", "cluster": "demo", "listen": "127.0.0.1:7001"}
    members |= {"admin_listen": "127.0.0.1:0", "metrics_listen": ""} | changes
    return CustodianConfig(directory, **members)  # type: ignore[arg-type]


def init(directory: Path, **changes: str) -> None:
    initialise(config(directory, **changes), "secret", now=NOW, opslimit=1, memlimit=8 << 10)


def public_file(name: str = "alice", role: str = "owner", identity: Identity = ALICE) -> bytes:
    document = {"name": name, "role": role, "identity": base64.b64encode(identity.public.to_bytes()).decode()}
    return json.dumps(document | {"hpke": base64.b64encode(RecipientKey.generate().public).decode()}).encode()


# -- configuration ---------------------------------------------------------------------------------------------------


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    written = config(tmp_path, metrics_listen="[::1]:9100", witness_listen="127.0.0.1:7100")
    (tmp_path / "custodian.toml").write_text(render_config(written))
    assert load_config(tmp_path) == written


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("releases_per_owner_per_huor = 5", Reason.MALFORMED),
        ("releases_per_owner_per_hour = 0", Reason.MALFORMED),
        ('releases_per_owner_per_hour = "many"', Reason.MALFORMED),
        ("shutdown_grace = 1.5", Reason.MALFORMED),
        ("max_cosignature_age = 29", Reason.MALFORMED),
        ("max_cosignature_age = 0", Reason.MALFORMED),
        ('witness_listen = "nowhere"', Reason.MALFORMED),
        ("this is not toml", Reason.MALFORMED),
    ],
)
def test_a_configuration_nobody_meant_is_refused(tmp_path: Path, line: str, reason: Reason) -> None:
    text = render_config(config(tmp_path)).replace("releases_per_owner_per_hour = 1000\n", "")
    text = text.replace("max_cosignature_age = 600\n", "").replace('witness_listen = ""\n', "")
    (tmp_path / "custodian.toml").write_text(text.replace("shutdown_grace = 10\n", "") + line + "\n")
    with pytest.raises(MalformedError) as caught:
        load_config(tmp_path)
    assert caught.value.reason is reason


@pytest.mark.parametrize("member", ["id", "jurisdiction", "cluster", "listen", "admin_listen", "metrics_listen"])
def test_no_member_may_be_missing(tmp_path: Path, member: str) -> None:
    lines = [line for line in render_config(config(tmp_path)).splitlines() if not line.startswith(f"{member} ")]
    (tmp_path / "custodian.toml").write_text("\n".join(lines))
    with pytest.raises(MalformedError, match=member):
        load_config(tmp_path)


def test_a_folder_without_a_custodian_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        load_config(tmp_path)
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:99999", "a b:80", "host:80\n", "[::1:80"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(MalformedError):
        parse_address(address, "listen")


# -- init ------------------------------------------------------------------------------------------------------------


def test_init_makes_a_whole_custodian(tmp_path: Path) -> None:
    init(tmp_path / "ch-1", listen="127.0.0.1:0")
    made = load_config(tmp_path / "ch-1")
    assert not made.listen.endswith(":0")
    assert not made.admin_listen.endswith(":0")
    card = open_card((tmp_path / "ch-1" / "card.json").read_bytes(), cluster="demo")
    assert card.custodian.address == made.listen
    assert card.custodian.tls_certificate == (tmp_path / "ch-1" / "tls-cert.pem").read_text()
    store = Keystore.open(made.keystore, "secret")
    assert store.identity().public == card.custodian.identity
    assert store.recipient().public == card.custodian.hpke
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ch-1"]
    assert (tmp_path / "ch-1").stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "ch-1").iterdir())


def test_init_never_overwrites(tmp_path: Path) -> None:
    init(tmp_path / "ch-1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ch-1").iterdir() if path.is_file()}
    with pytest.raises(StateError) as caught:
        init(tmp_path / "ch-1")
    assert caught.value.reason is Reason.EXISTS
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "ch-1").iterdir() if path.is_file()}


def test_init_removes_no_folder_that_is_not_its_own_leftover(tmp_path: Path) -> None:
    (tmp_path / "ch-1.init").mkdir()
    (tmp_path / "ch-1.init" / "thesis.txt").write_text("years of work")
    with pytest.raises(StateError) as caught:
        init(tmp_path / "ch-1")
    assert caught.value.reason is Reason.EXISTS
    assert (tmp_path / "ch-1.init" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "changes", [{"id": "CH 1"}, {"jurisdiction": "Switzerland"}, {"cluster": "../x"}, {"listen": "nowhere"}]
)
def test_init_with_a_bad_name_leaves_nothing(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(MalformedError):
        init(tmp_path / "ch-1", **changes)
    assert not list(tmp_path.iterdir())


def test_init_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("keyquorum_custodian.init.write_file", full)
    with pytest.raises(UnavailableError) as caught:
        init(tmp_path / "ch-1")
    assert caught.value.reason is Reason.STORAGE
    assert not list(tmp_path.iterdir())


# -- owners and operators --------------------------------------------------------------------------------------------


def test_an_owner_is_known_once_added_and_unknown_once_removed(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    with pytest.raises(RefusedError) as caught:
        owners.identity("alice")
    assert caught.value.reason is Reason.UNKNOWN_OWNER
    add_owner(tmp_path, public_file())
    assert owners.identity("alice") == ALICE.public
    add_owner(tmp_path, public_file())
    (tmp_path / "alice.json").unlink()
    with pytest.raises(RefusedError):
        owners.identity("alice")


@pytest.mark.parametrize("settled", [True, False])
def test_an_owner_file_rewritten_in_place_counts_at_once(
    tmp_path: Path, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settled:
        monkeypatch.setattr("keyquorum_custodian.stamps._SETTLED_NS", -(1 << 62))
    owners = Owners(tmp_path)
    add_owner(tmp_path, public_file())
    add_owner(tmp_path, public_file("bea"))
    assert owners.identity("alice") == owners.identity("bea") == ALICE.public
    before = tmp_path.stat().st_mtime_ns
    other = Identity.generate()
    rewritten = {"name": "alice", "identity": base64.b64encode(other.public.to_bytes()).decode()}
    time.sleep(0.02)  # beyond the grain of file times
    (tmp_path / "alice.json").write_text(json.dumps(rewritten, indent=1) + "\n")
    assert tmp_path.stat().st_mtime_ns == before
    assert owners.identity("alice") == other.public
    assert owners.identity("bea") == ALICE.public
    assert owners.all()["alice"] == other.public


def test_an_owner_is_not_replaced_by_another_of_the_same_name(tmp_path: Path) -> None:
    add_owner(tmp_path, public_file())
    with pytest.raises(StateError) as caught:
        add_owner(tmp_path, public_file(identity=Identity.generate()))
    assert caught.value.reason is Reason.EXISTS
    assert Owners(tmp_path).identity("alice") == ALICE.public


@pytest.mark.parametrize("file", [b"", b"{}", public_file(name="../../etc/passwd"), public_file(role="operator")])
def test_a_file_that_is_no_owner_is_refused(tmp_path: Path, file: bytes) -> None:
    with pytest.raises(KeyquorumError):
        add_owner(tmp_path, file)
    assert not list(tmp_path.iterdir())


def test_an_owner_file_under_another_name_is_refused(tmp_path: Path) -> None:
    add_owner(tmp_path, public_file())
    (tmp_path / "alice.json").rename(tmp_path / "mallory.json")
    with pytest.raises(MalformedError):
        Owners(tmp_path).all()


@pytest.mark.parametrize("threshold", [0, 2])
def test_operators_have_a_threshold_that_can_be_met(tmp_path: Path, threshold: int) -> None:
    identity = base64.b64encode(ALICE.public.to_bytes()).decode()
    path = tmp_path / "operators.json"
    path.write_text(json.dumps({"threshold": 1, "operators": {"olga": identity}}))
    assert load_operators(path).identities == {"olga": ALICE.public}
    path.write_text(json.dumps({"threshold": threshold, "operators": {"olga": identity}}))
    with pytest.raises(MalformedError):
        load_operators(path)


# -- quota -----------------------------------------------------------------------------------------------------------


def test_a_quota_slides_with_the_hour_and_is_each_owner_s_own() -> None:
    quota = Quota(2, [("alice", NOW - 3599), ("alice", NOW)])
    with pytest.raises(RefusedError) as caught:
        quota.check("alice", NOW)
    assert caught.value.reason is Reason.QUOTA
    assert "1 s" in caught.value.next_step
    quota.check("bob", NOW)
    quota.check("alice", NOW + 1)
    quota.count("alice", NOW + 1)
    with pytest.raises(RefusedError):
        quota.check("alice", NOW + 2)
