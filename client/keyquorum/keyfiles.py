"""Key files of owners and operators: ``NAME.key.json`` (wrapped under a passphrase) and ``NAME.pub.json``.

A private key file is written once and never replaced: whoever loses it loses every result sealed to it, and nobody
can make it again.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.keywrap import LoadedKeys, load_keys, save_keys
from keyquorum_core.names import PRINCIPAL, check
from keyquorum_core.sealing import RecipientKey, Suite, check_public
from keyquorum_core.signing import PUBLIC_IDENTITY_SIZE, Identity, PublicIdentity
from keyquorum_core.streams import write_all
from keyquorum_core.strictjson import Fields, loads
from keyquorum_protos.wire.files import read_bytes

__all__ = [
    "PASSPHRASE_ENVIRONMENT",
    "PassphraseSource",
    "PublicKeys",
    "create_keys",
    "read_public_keys",
    "unlock",
    "write_new",
]

PASSPHRASE_ENVIRONMENT = "KEYQUORUM_PASSPHRASE"  # noqa: S105 - the name of a variable
ROLES = ("owner", "operator")

PassphraseSource = str | Callable[[Path], str] | None
"""A passphrase, something that asks for a key file's when it is needed, or ``None`` for the environment variable."""


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """The contents of a ``NAME.pub.json``: what others need to know an owner or operator."""

    name: str
    role: str
    identity: PublicIdentity
    hpke: bytes

    def to_bytes(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(
            {
                "name": self.name,
                "role": self.role,
                "identity": base64.b64encode(self.identity.to_bytes()).decode(),
                "hpke": base64.b64encode(self.hpke).decode(),
            }
        )


def read_public_keys(path: Path) -> PublicKeys:
    """Raises :class:`MalformedError` for anything but a well-formed public key file."""
    what = "public key file"
    fields = Fields(loads(read_bytes(path, what), what), what)
    out = PublicKeys(
        fields.text("name", max_length=64),
        fields.text("role", max_length=16),
        PublicIdentity.from_bytes(
            fields.base64("identity", min_bytes=PUBLIC_IDENTITY_SIZE, max_bytes=PUBLIC_IDENTITY_SIZE)
        ),
        fields.base64("hpke"),
    )
    fields.done()
    check_public(out.hpke)
    return out


def write_new(path: Path, data: bytes, *, private: bool) -> None:
    """Write a file that is not there yet: whole or not at all, mode 0600 when ``private``.

    Raises :class:`StateError` (``EXISTS``), :class:`UnavailableError` (``STORAGE``).
    """
    try:
        # Created 0600. Without a buffer, so that closing it writes nothing more to a full disk and the name goes away.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", buffering=0) as file:
            write_all(file, memoryview(data))
            os.fsync(file.fileno())
            if not private:
                os.fchmod(file.fileno(), 0o644)
            os.link(file.name, path)  # fails where the name is taken, unlike a rename
    except FileExistsError:
        raise StateError(
            Reason.EXISTS, f"{path} is already there", next_step="It is never replaced: choose another name or folder"
        ) from None
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{path} can't be written", actual=error.strerror) from None


def create_keys(
    directory: Path, name: str, role: str, passphrase: str, *, suite: str = Suite.MLKEM768_X25519
) -> PublicKeys:
    """Make an owner's or operator's keys and write both files into ``directory`` (made, 0700, if missing).

    Raises :class:`StateError` (``EXISTS``) where a file is there, :class:`MalformedError` for a bad name or role.
    """
    if role not in ROLES:
        raise MalformedError(Reason.ROLE, "no such role", expected=" or ".join(ROLES), actual=role[:32])
    check(PRINCIPAL, name, "name")
    if not passphrase:
        raise RefusedError(Reason.PASSPHRASE, "an empty passphrase protects nothing")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{directory} can't be made", actual=error.strerror) from None
    private, public = directory / f"{name}.key.json", directory / f"{name}.pub.json"
    for path in (private, public):
        if path.exists():
            raise StateError(
                Reason.EXISTS, f"{path} is already there", next_step="Keys are never replaced: choose another name"
            )
    identity, recipient = Identity.generate(), RecipientKey.generate(suite)
    keys = PublicKeys(name, role, identity.public, recipient.public)
    write_new(private, save_keys(identity, recipient, passphrase, role=role, name=name), private=True)
    write_new(public, keys.to_bytes(), private=False)
    return keys


def unlock(path: Path, role: str, name: str | None, passphrase: PassphraseSource) -> LoadedKeys:
    """Open a private key file. Takes a second or so: Argon2id.

    Raises :class:`RefusedError` (``PASSPHRASE``) for a wrong or missing passphrase, :class:`UnavailableError`
    (``NOT_FOUND``) for a lost file, and :class:`RefusedError` (``ROLE``) for somebody else's.
    """
    try:
        blob = read_bytes(path, f"{role}'s key file")
    except UnavailableError as error:
        if error.reason is Reason.NOT_FOUND:
            error.next_step = (
                "Restore it from your backup. Without it no result sealed to it can be opened; "
                "'keyquorum identity create' makes new keys for new jobs"
            )
        raise
    secret = passphrase(path) if callable(passphrase) else passphrase
    if secret is None:
        secret = os.environ.get(PASSPHRASE_ENVIRONMENT)
    if not secret:
        raise RefusedError(
            Reason.PASSPHRASE,
            f"{path.name} needs its passphrase",
            next_step=f"Set {PASSPHRASE_ENVIRONMENT}, or pass one",
        )
    keys = load_keys(blob, secret)
    if keys.role != role or (name is not None and keys.name != name):
        raise RefusedError(
            Reason.ROLE,
            f"{path.name} holds somebody else's keys",
            expected=f"{role} {name or ''}".strip(),
            actual=f"{keys.role} {keys.name}",
        )
    return keys
