"""G1: the job key exists only at the owner and in the enclave. Somebody who owns the coordinator looks everywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

import keyquorum
from keyquorum_core import derivation
from keyquorum_core.derivation import Combiner
from keyquorum_core.manifest import Manifest, payload, subject
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_custodian.node import open_node
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import CUSTODIANS, QUORUM, REGION, Layout, create
from keyquorum_protos.wire.ports import choose_port
from tests.support.memory import can_read_memory, find_in_files, find_in_memory
from tests.support.recorder import Recorder

KEY = "g1"


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[Layout, Cluster, list[Recorder]]]:
    """A cluster in which every connection to a custodian and to the coordinator runs through a relay that keeps all."""
    layout = create(tmp_path / "cluster")
    relays = []
    for config in [layout.custodian(name) / "custodian.toml" for name, _ in layout.custodians] + [
        layout.coordinator / "coordinator.toml"
    ]:
        behind = choose_port()
        lines = config.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("listen"))
        front = int(lines[at].strip('"').rpartition(":")[2])
        lines[at] = f'listen = "127.0.0.1:{behind}"'
        config.write_text("\n".join([*lines, ""]))
        relays.append(Recorder(front, behind))
    for relay in relays:
        relay.__enter__()
    cluster = Cluster(layout)
    try:
        cluster.start()
        yield layout, cluster, relays
    finally:
        cluster.stop()
        for relay in relays:
            relay.__exit__(None, None, None)


def secrets_of(layout: Layout, signed: Manifest) -> dict[str, bytes]:
    """The job's root, purpose keys and every contribution, from the custodians' own keystores."""
    context = derivation.context(signed.key_id, signed.epoch, "job", subject(payload(signed)))
    combiner = Combiner(Quorum(dict(QUORUM), [Custodian(*each) for each in CUSTODIANS]), context)
    out: dict[str, bytes] = {}
    for name, _ in layout.custodians:
        node = open_node(layout.custodian(name), layout.passphrase(name).read_text())
        contributions = node.epochs.active(signed.key_id, signed.epoch).contributions(context)
        node.close()
        combiner.add(name, contributions)
        out |= {f"contribution {index}": value for index, value in contributions.items()}
    key = combiner.conclude().key
    out["root"] = key.root
    return out | {f"{name} key": key.purpose_key(name) for name in ("bundle", "result", "telemetry")}


@pytest.mark.timeout(180)
def test_g1_the_coordinator_never_holds_the_job_key_or_a_contribution(
    recorded: tuple[Layout, Cluster, list[Recorder]], job: Path
) -> None:
    """G1: neither its database and store, nor its memory, nor the traffic of all its connections hold one; nor does
    any log. (What the traffic holds before TLS hides it: tests/adversarial/test_what_custodians_say.py.)"""
    layout, cluster, relays = recorded
    with keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client:
        client.key_create(KEY)
        submitted = client.submit(job, key=KEY, regions=[REGION])
        client.result(submitted.id)
        manifest = client.job(submitted.id).manifest
    pid = cluster.coordinator.pid
    readable = can_read_memory(pid)  # not where ptrace is restricted: that part is left out there

    # What the coordinator does hold: a search that finds nothing would prove nothing.
    known = {"job id": submitted.id.encode()}
    assert not readable or "job id" in find_in_memory(pid, known)
    assert "job id" in find_in_files(layout.coordinator, known)
    assert "job id" in find_in_files(layout.logs, known)
    assert sum(len(relay.traffic) for relay in relays) > 100_000

    for process in cluster.custodians.values():
        process.stop()  # a keystore opens for one process at a time
    secrets = secrets_of(layout, manifest)
    assert len(secrets) > 8
    passphrases = {name: layout.passphrase(name).read_bytes() for name, _ in layout.custodians}
    needles = {"plaintext": b"a secret of the owner 4711", **passphrases}
    for name, value in secrets.items():
        needles |= {
            name: value,
            f"{name} in hex": value.hex().encode(),
            f"{name} in base64": base64.b64encode(value)[:42],
        }
    assert not readable or find_in_memory(pid, needles) == set()
    assert find_in_files(layout.coordinator, needles) == set()
    assert find_in_files(layout.logs, needles) == set()
    for relay in relays:
        traffic = bytes(relay.traffic)
        assert [name for name, value in needles.items() if value in traffic] == []
