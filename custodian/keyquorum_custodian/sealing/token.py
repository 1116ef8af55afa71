"""A PKCS#11 token (OASIS PKCS #11 v2.40): keys that never leave it, and what it computes with them.

The module is a shared library that this process loads, named in custodian.toml and never by the keystore: whoever could
write the keystore would otherwise choose what the custodian runs. Keys are made sensitive and not extractable, and a
token that makes them otherwise is refused. One login per process and token; a lost session is not opened again, since
nobody kept the PIN: the custodian is then unsealed anew.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_custodian.sealing.record import TokenKey

__all__ = ["Token"]

_MAX_LABEL: Final = 32
_TAG_BITS: Final = 128


class Token:
    """One token, logged in to. Make it with :meth:`open`; used from one thread at a time, which it sees to itself."""

    def __init__(self, session: Any, label: str, serial: str) -> None:
        self._session = session
        self._lock = threading.Lock()
        self.label = label
        self.serial = serial

    def __repr__(self) -> str:
        return f"Token({self.label!r}, {self.serial!r})"

    @classmethod
    def open(cls, module: str, pin: str, label: str, serial: str = "") -> Token:
        """Log in to the token with this label and, unless empty, serial number, by the library at ``module``.

        Raises ``UNSUPPORTED`` (no module configured, or none that can be loaded), ``UNAVAILABLE`` (no such token),
        ``PASSPHRASE`` (the token refuses the PIN, or has locked it) and ``STATE`` (this process is logged in to it).
        """
        pkcs11 = _library(module)
        with _failures(f"the token {label!r}"):
            found = [
                token
                for slot in pkcs11.lib(module).get_slots(token_present=True)
                for token in [slot.get_token()]
                if token.label == label and serial in ("", _serial(token))
            ]
            if len(found) != 1:
                raise UnavailableError(
                    Reason.UNAVAILABLE,
                    "the PKCS#11 token is not there" if not found else "several PKCS#11 tokens have that label",
                    expected=f"one token {label!r}" + (f" with serial number {serial}" if serial else ""),
                    actual=f"{len(found)} of them by {module}",
                    next_step="Plug it in, or check pkcs11_module in custodian.toml.",
                )
            try:
                session = found[0].open(rw=True, user_pin=pin)
            except pkcs11.exceptions.UserAlreadyLoggedIn:
                raise StateError(
                    Reason.STATE, "this process is logged in to the token already", expected="one keystore to a token"
                ) from None
            return cls(session, label, _serial(found[0]))

    def close(self) -> None:
        """Log out. The keys stay in the token."""
        with contextlib.suppress(Exception), self._lock:
            self._session.close()

    # -- the key that wraps the keystore's ---------------------------------------------------------------------------

    def make_wrapping_key(self, key_id: bytes, custodian: str) -> TokenKey:
        """A new AES-256 key that the token keeps, for one keystore."""
        from pkcs11 import Attribute, KeyType

        with _failures("the token"), self._lock:
            key = self._session.generate_key(
                KeyType.AES,
                256,
                id=key_id,
                label=f"keyquorum keystore {custodian}",
                store=True,
                template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True},
            )
            try:
                _check_kept(key)
            except KeyquorumError:
                key.destroy()
                raise
        return TokenKey(self.label, self.serial, key_id)

    def encrypt(self, key: TokenKey, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        """AES-256-GCM (CKM_AES_GCM): ciphertext ‖ tag of 16 bytes."""
        from pkcs11 import GCMParams, Mechanism

        with _failures("the token"), self._lock:
            parameters = GCMParams(nonce, associated, _TAG_BITS)
            return bytes(self._key(key).encrypt(data, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

    def decrypt(self, key: TokenKey, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        """Inverse of :meth:`encrypt`. Raises ``UNSEAL``: tokens differ in what they call a wrong tag."""
        from pkcs11 import GCMParams, Mechanism
        from pkcs11.exceptions import PKCS11Error

        with _failures("the token"), self._lock:
            parameters = GCMParams(nonce, associated, _TAG_BITS)
            wrapping = self._key(key)
            try:
                return bytes(wrapping.decrypt(data, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))
            except PKCS11Error as error:
                raise RefusedError(
                    Reason.UNSEAL,
                    "the token's key does not open the keystore",
                    expected="the key and the sealing record that were made together",
                    actual=type(error).__name__,
                    next_step="Restore the keystore from a backup, or have this custodian repaired by its peers.",
                ) from None

    def destroy_wrapping_key(self, key: TokenKey) -> None:
        """What it wrapped is gone for good. One that is not there is gone already."""
        from pkcs11 import Attribute, ObjectClass

        with _failures("the token"), self._lock:
            wanted = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.ID: key.key_id}
            for found in list(self._session.get_objects(wanted)):
                found.destroy()

    def keeps(self, key: TokenKey) -> bool:
        """Whether it is the token that a key is in."""
        return (self.label, self.serial) == (key.label, key.serial)

    # -- seeds -------------------------------------------------------------------------------------------------------

    def put_seed(self, object_id: bytes, label: str, seed: bytes) -> Any:
        """A seed as a key of the token's own (CKK_GENERIC_SECRET) that signs and nothing else; returns its handle."""
        from pkcs11 import Attribute, KeyType, ObjectClass

        with _failures("the token"), self._lock:
            key = self._session.create_object(
                {
                    Attribute.CLASS: ObjectClass.SECRET_KEY,
                    Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                    Attribute.VALUE: seed,
                    Attribute.ID: object_id,
                    Attribute.LABEL: label,
                    Attribute.TOKEN: True,
                    Attribute.PRIVATE: True,
                    Attribute.SENSITIVE: True,
                    Attribute.EXTRACTABLE: False,
                    Attribute.SIGN: True,
                }
            )
            try:
                _check_kept(key)
            except KeyquorumError:
                key.destroy()
                raise
            return key

    def seeds(self, label: str) -> dict[bytes, Any]:
        """The handles of all keys with this label, by CKA_ID."""
        from pkcs11 import Attribute, ObjectClass

        with _failures("the token"), self._lock:
            wanted = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: label}
            return {bytes(key[Attribute.ID]): key for key in self._session.get_objects(wanted)}

    def destroy(self, key: Any) -> None:
        with _failures("the token"), self._lock:
            key.destroy()

    def mac(self, key: Any, message: bytes) -> bytes:
        """HMAC-SHA-256 under a key of the token (CKM_SHA256_HMAC), 32 bytes."""
        from pkcs11 import Mechanism

        with _failures("the token"), self._lock:
            return bytes(key.sign(message, mechanism=Mechanism.SHA256_HMAC))

    def digest(self, key: Any, before: bytes, after: bytes) -> bytes:
        """SHA-256(before ‖ key ‖ after) by C_DigestKey, 32 bytes. Raises ``UNSUPPORTED`` where the token will not."""
        from pkcs11 import Mechanism
        from pkcs11.exceptions import PKCS11Error

        with _failures("the token"), self._lock:
            try:
                parts = [part for part in (before, key, after) if part != b""]
                return bytes(self._session.digest(parts, mechanism=Mechanism.SHA256))
            except PKCS11Error as error:
                raise UnavailableError(
                    Reason.UNSUPPORTED,
                    "the token does not hash its keys",
                    expected="C_DigestKey for keys that are sensitive and not extractable",
                    actual=type(error).__name__,
                ) from None

    def _key(self, key: TokenKey) -> Any:
        from pkcs11 import Attribute, ObjectClass

        found = list(self._session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.ID: key.key_id}))
        if len(found) != 1:
            raise UnavailableError(
                Reason.UNAVAILABLE,
                "the token does not hold the key that opens the keystore",
                expected=f"one key with CKA_ID {key.key_id.hex()}",
                actual=len(found),
                next_step="Use the token that the keystore was sealed with, or have this custodian repaired.",
            )
        _check_kept(found[0])
        return found[0]


def _check_kept(key: Any) -> None:
    """Raise ``UNSUPPORTED`` unless the token keeps the key to itself."""
    from pkcs11 import Attribute

    if key[Attribute.EXTRACTABLE] or not key[Attribute.SENSITIVE]:
        raise RefusedError(
            Reason.UNSUPPORTED,
            "the token would give its key away",
            expected="a key that is sensitive and not extractable",
            actual="one that can be taken out",
            next_step="Use a token that keeps keys to itself.",
        )


def _serial(token: Any) -> str:
    return bytes(token.serial).decode("ascii", "replace").strip() if token.serial else ""


def _library(module: str) -> Any:
    if not module or not Path(module).is_absolute():
        raise UnavailableError(
            Reason.UNSUPPORTED,
            "no PKCS#11 module is configured",
            expected="pkcs11_module in custodian.toml, an absolute path",
            actual=module or "none",
            next_step="Name your token's library there, as /usr/lib/softhsm/libsofthsm2.so.",
        )
    try:
        import pkcs11
        import pkcs11.exceptions
    except ImportError:
        raise UnavailableError(
            Reason.UNSUPPORTED,
            "python-pkcs11 is not installed",
            next_step="Install keyquorum-custodian with its extra pkcs11.",
        ) from None
    return pkcs11


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """PKCS#11 return codes as typed errors. What they say is the code's name alone."""
    from pkcs11 import exceptions

    try:
        yield
    except (exceptions.PinIncorrect, exceptions.PinInvalid, exceptions.PinLenRange) as error:
        raise RefusedError(
            Reason.PASSPHRASE,
            f"{what} refused the PIN",
            expected="the user PIN that the token was set up with",
            actual=type(error).__name__,
            next_step="Mind that tokens lock after a few wrong PINs.",
        ) from None
    except (exceptions.PinLocked, exceptions.PinExpired, exceptions.UserPinNotInitialized) as error:
        raise RefusedError(
            Reason.PASSPHRASE,
            f"{what} lets nobody in",
            expected="a user PIN that is set and not locked",
            actual=type(error).__name__,
            next_step="Have the token's security officer set the user PIN again.",
        ) from None
    except (exceptions.PKCS11Error, RuntimeError) as error:
        raise UnavailableError(
            Reason.UNAVAILABLE,
            f"{what} failed",
            actual=type(error).__name__,
            next_step="Check the token and its library; then unseal the custodian again.",
        ) from None
