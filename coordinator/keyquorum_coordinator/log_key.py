"""The ledger's signing keys on the coordinator's disk: made once by ``init``, read strictly, never made by serving.

``log-key.json`` holds the origin and both private keys; ``log.vkey`` the two verifier keys in one line, which the
operators put into the roster. Whoever has the private keys can sign forks of the log; the custodians, who cosign only
what extends what they saw, are what makes a fork visible.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.strictjson import Fields, loads
from keyquorum_protos.wire.files import read_private

__all__ = ["LOG_VKEY", "encode_log_key", "load_log_key", "log_origin"]

LOG_VKEY: Final = "log.vkey"


def log_origin(cluster: str) -> str:
    """The name that a cluster's ledger signs under, unless ``init`` is given another."""
    return f"{cluster}/ledger"


def encode_log_key(signer: LogSigner) -> bytes:
    """What ``log-key.json`` holds."""
    ed25519, ml_dsa_44 = signer.seeds()
    return jcs.dumps({"origin": signer.origin, "ed25519": ed25519.hex(), "ml_dsa_44": ml_dsa_44.hex()})


def load_log_key(path: Path) -> LogSigner:
    """Raises ``NOT_FOUND``, ``STORAGE``, :class:`MalformedError`, and ``ROLE`` for a file that others may read."""
    what = "the ledger's signing keys"
    data = read_private(path, what, 4096, "sign a fork of the log")
    fields = Fields(loads(data, what, max_depth=1), what)
    signer = LogSigner.from_seeds(fields.text("origin"), fields.hex("ed25519", 32), fields.hex("ml_dsa_44", 32))
    fields.done()
    return signer
