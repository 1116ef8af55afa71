"""A log, one custodian's keystore and its witness, and two peers that cosign: what a witness's tests begin with."""

from __future__ import annotations

from pathlib import Path

from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.ledger_store import Alarm, LedgerStore
from keyquorum_custodian.witness import Inclusion, Witness
from tests.support.ledger import MemoryLog

__all__ = ["AGE", "COSIGNERS", "LOG", "ME", "OTHERS", "QUORUM", "START", "TRUST", "Scene", "make_scene"]

START = 1_800_000_000
AGE = 600
IDS = ("ch-1", "is-1", "no-1")
COSIGNERS = {name: Cosigner.generate(f"demo/{name}") for name in IDS}
ME = "ch-1"
OTHERS = ("is-1", "no-1")
LOG = LogSigner.generate("demo/ledger")
QUORUM = Quorum({"at_least": 2}, [Custodian(name, name[:2].upper()) for name in IDS])
TRUST = LogTrust(LOG.keys, {name: each.keys for name, each in COSIGNERS.items()}, QUORUM)


class Scene:
    """A log, this custodian's keystore, and its witness; :meth:`restart` forgets what was only in memory."""

    def __init__(self, path: Path, keystore: Keystore) -> None:
        self.now: float = START
        self.path = path
        self.keystore = keystore
        self.log = MemoryLog(LOG, self.clock, COSIGNERS)
        self.heard: list[Alarm] = []
        self.witness = self.restart()

    def clock(self) -> float:
        return self.now

    def restart(self, trust: LogTrust | None = TRUST) -> Witness:
        store = LedgerStore(self.keystore)
        self.witness = Witness(trust, COSIGNERS[ME], store, self.clock, max_age=AGE, on_alarm=self.heard.append)
        return self.witness

    def vouch(self) -> None:
        """The others, a quorum, cosign the log as it is, and this custodian hears of it."""
        self.witness.update(self.log.update(self.witness.size, cosigned=self.log.cosigned(by=OTHERS)))

    def show(self, leaf: bytes = b"leaf") -> Inclusion:
        inclusion = self.log.append(leaf)
        self.vouch()
        return inclusion


def make_scene(folder: Path) -> Scene:
    """With a keystore of its own, to be closed."""
    path = folder / "k.db"
    keystore = Keystore.create(
        path, ME, Identity.generate(), RecipientKey.generate(), COSIGNERS[ME], "p", opslimit=1, memlimit=8 << 10
    )
    return Scene(path, keystore)
