"""The coordinator's drill identity: with it the coordinator asks for canary keys as an owner, and signs drill reports.

``drill-key.json`` holds the private keys, mode 0600; ``drill.pub.json`` is what custodians' operators add with
``keyquorum-custodian owner add --canary`` and what client profiles pin. It is the one key that opens shares on a
coordinator, and custodians give it shares of canary keys only, which guard nothing.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_core.strictjson import Fields, loads
from keyquorum_protos.wire.files import read_private

__all__ = [
    "DRILL_KEY",
    "DRILL_OWNER",
    "DRILL_PUBLIC",
    "create_drill_key",
    "encode_drill_key",
    "encode_drill_public",
    "generate_drill_key",
    "load_drill_key",
]

DRILL_KEY: Final = "drill-key.json"
DRILL_PUBLIC: Final = "drill.pub.json"
DRILL_OWNER: Final = "drill"
"""The owner's name in key requests and manifests."""
_WHAT = "the drill identity"


def generate_drill_key() -> LoadedKeys:
    """New keys, from the system's randomness."""
    return LoadedKeys(DRILL_OWNER, "owner", Identity.generate(), RecipientKey.generate())


def encode_drill_key(keys: LoadedKeys) -> bytes:
    """What ``drill-key.json`` holds."""
    ed25519, ml_dsa_65 = keys.identity.seeds()
    recipient = base64.b64encode(keys.recipient.to_seed_bytes()).decode()
    return jcs.dumps({"ed25519": ed25519.hex(), "ml_dsa_65": ml_dsa_65.hex(), "recipient": recipient})


def encode_drill_public(keys: LoadedKeys) -> bytes:
    """What ``drill.pub.json`` holds: the form of any owner's ``NAME.pub.json``."""
    return jcs.dumps(
        {
            "hpke": base64.b64encode(keys.recipient.public).decode(),
            "identity": base64.b64encode(keys.identity.public.to_bytes()).decode(),
            "name": keys.name,
            "role": keys.role,
        }
    )


def load_drill_key(directory: Path) -> LoadedKeys | None:
    """None where the coordinator has none. Raises ``STORAGE``, :class:`MalformedError`, and ``ROLE`` for a file that
    others may read."""
    path = directory / DRILL_KEY
    if not path.exists():
        return None
    data = read_private(path, _WHAT, 64 << 10, "sign drill reports")
    fields = Fields(loads(data, _WHAT, max_depth=1), _WHAT)
    keys = LoadedKeys(
        DRILL_OWNER,
        "owner",
        Identity.from_seeds(fields.hex("ed25519", 32), fields.hex("ml_dsa_65", 32)),
        RecipientKey.from_seed_bytes(fields.base64("recipient", max_bytes=4096)),
    )
    fields.done()
    return keys


def create_drill_key(directory: Path) -> LoadedKeys:
    """Make both files in a coordinator's folder that has none: one set up before there were drills.

    Where only the public file is missing, it is written anew. Raises ``EXISTS``, ``STORAGE``."""
    keys = load_drill_key(directory)
    if keys is not None and (directory / DRILL_PUBLIC).exists():
        raise StateError(
            Reason.EXISTS,
            f"{directory} has a drill identity already; it was not changed",
            actual=keys.identity.public.fingerprint,
            next_step=f"Give {directory / DRILL_PUBLIC} to the custodians' operators",
        )
    keys = keys or generate_drill_key()
    try:
        if not (directory / DRILL_KEY).exists():
            _write(directory / DRILL_KEY, encode_drill_key(keys), 0o600)
        _write(directory / DRILL_PUBLIC, encode_drill_public(keys), 0o644)
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, f"{_WHAT} could not be written to {directory}", actual=error.strerror
        ) from None
    return keys


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never over another."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.link(partial, path)
    partial.unlink()
