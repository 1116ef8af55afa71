"""``keyquorum-custodian unseal``, ``seal`` and ``reseal``, and what ``init`` asks about sealing."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_custodian.cli_parts import Directory, Json, PassphraseFile, passphrase_from
from keyquorum_protos.wire.refusals import refusals

if TYPE_CHECKING:
    from keyquorum_custodian.sealing.schemes import Secret, Wrapping
    from keyquorum_custodian.sealing.token import Token

__all__ = [
    "SCHEMES",
    "Module",
    "PinFile",
    "Sealing",
    "ShareDirectory",
    "Shares",
    "TokenLabel",
    "choose_wrapping",
    "say_void",
    "sealing_app",
]

SCHEMES = ("passphrase", "slip39", "pkcs11", "pkcs11-seeds")
sealing_app = typer.Typer()

Sealing = Annotated[
    str, typer.Option("--sealing", help="What opens the keystore: passphrase, slip39, pkcs11 or pkcs11-seeds.")
]
Module = Annotated[str, typer.Option("--module", help="pkcs11: the token's library; it goes into custodian.toml.")]
Shares = Annotated[str, typer.Option("--shares", help="slip39: k/n, as 3/5: any 3 of 5 officers open it.")]
ShareDirectory = Annotated[
    Path | None,
    typer.Option("--share-dir", help="slip39: write each share to a file of its own here, instead of showing them."),
]
TokenLabel = Annotated[str, typer.Option("--token", help="pkcs11: the token's label; its library is pkcs11_module.")]
PinFile = Annotated[Path | None, typer.Option("--pin-file", help="pkcs11: a file whose first line is the PIN.")]
_ShareFiles = Annotated[
    list[Path] | None, typer.Option("--share-file", help="A file with one share; repeat it for each officer's.")
]
_START_SECONDS = 60.0


def _lines(path: Path, what: str) -> list[str]:
    from keyquorum_protos.wire.files import read_bytes

    lines = read_bytes(path, what, 4096).decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _share_from(path: Path) -> str:
    return " ".join(_lines(path, "the share file"))


def _ask(prompt: str, *, confirm: bool = False, next_step: str) -> str:
    if not sys.stdin.isatty():
        raise RefusedError(Reason.PASSPHRASE, f"nobody is at a terminal to enter: {prompt}", next_step=next_step)
    return str(typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True))


# -- choosing a scheme -------------------------------------------------------------------------------------------------


def choose_wrapping(
    scheme: str,
    custodian: str,
    *,
    passphrase_file: Path | None,
    shares: str = "",
    share_dir: Path | None = None,
    token: str = "",
    module: str = "",
    pin_file: Path | None = None,
    open_token: Token | None = None,
    environment: bool = True,
) -> Wrapping:
    """The scheme that the options ask for, ready to seal: shares handed out, token logged in to.

    ``open_token``: one that this process is logged in to. ``environment``: a passphrase may come from there. Raises
    typed errors, and typer's for options that do not fit together.
    """
    from keyquorum_custodian.sealing.record import Scheme
    from keyquorum_custodian.sealing.schemes import PassphraseWrapping, SharesWrapping, TokenWrapping
    from keyquorum_custodian.sealing.token import Token

    if scheme not in SCHEMES:
        raise typer.BadParameter(f"must be one of {', '.join(SCHEMES)}", param_hint="the scheme")
    if scheme == "passphrase":
        if environment or passphrase_file is not None:
            return PassphraseWrapping(passphrase_from(passphrase_file, confirm=True))
        return PassphraseWrapping(_ask("New passphrase", confirm=True, next_step="Use --new-passphrase-file."))
    if scheme == "slip39":
        from keyquorum_custodian.sealing.shares import new_shares

        threshold, count = _k_of_n(shares)
        made, secret, words = new_shares(threshold, count)
        _hand_out(words, threshold, custodian, share_dir)
        return SharesWrapping(made, secret)
    if not token:
        raise typer.BadParameter("pkcs11 needs the token's label", param_hint="--token")
    if open_token is not None and open_token.label == token:
        return TokenWrapping(open_token, Scheme(scheme))
    pin = "".join(_lines(pin_file, "the PIN file")[:1]) if pin_file is not None else ""
    if not pin:
        pin = (os.environ.pop("KEYQUORUM_PASSPHRASE", "") if environment else "") or _ask(
            f"PIN of token {token}", next_step="Use --pin-file."
        )
    return TokenWrapping(Token.open(module, pin, token), Scheme(scheme))


def _k_of_n(text: str) -> tuple[int, int]:
    from keyquorum_custodian.sealing.record import MAX_SHARES, MIN_THRESHOLD

    match = re.fullmatch(r"([0-9]{1,2})/([0-9]{1,2})", text)
    if match is None or not MIN_THRESHOLD <= int(match[1]) <= int(match[2]) <= MAX_SHARES:
        raise typer.BadParameter(
            f"must be k/n with {MIN_THRESHOLD} ≤ k ≤ n ≤ {MAX_SHARES}, as 3/5", param_hint="--shares"
        )
    return int(match[1]), int(match[2])


def _hand_out(words: Sequence[str], threshold: int, custodian: str, folder: Path | None) -> None:
    from keyquorum_custodian.share_handout import Screen, show_shares, write_shares

    if folder is not None:
        for path in write_shares(folder, words, threshold, custodian):
            typer.echo(f"Share written: {path}", err=True)
        return
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise RefusedError(
            Reason.PASSPHRASE,
            "nobody is at a terminal to write the shares down",
            next_step="Run at a terminal, or use --share-dir.",
        )

    def clear() -> None:  # the screen, and what can be scrolled back to
        sys.stderr.write("\x1b[2J\x1b[3J\x1b[H")
        sys.stderr.flush()

    def wait(text: str) -> None:
        typer.prompt(text, default="", show_default=False, prompt_suffix=" ", hide_input=True, err=True)

    screen = Screen(
        lambda line: typer.echo(line, err=True),
        lambda question: str(typer.prompt(question, hide_input=True, err=True)),
        wait,
        clear,
    )
    show_shares(screen, words, threshold, custodian)


def say_void(scheme: str) -> None:
    """What was handed out is of no use, since what it was for failed."""
    if scheme == "slip39":
        typer.echo("The new shares open nothing: destroy them.", err=True)


# -- commands ----------------------------------------------------------------------------------------------------------


@sealing_app.command()
def unseal(
    directory: Directory,
    share_file: Annotated[Path | None, typer.Option(help="A file with this officer's share.")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Give a sealed custodian what opens it: the passphrase, the token's PIN, or one officer's share.

    Officers enter their shares one after the other, each by a call of their own, from wherever they reach the
    custodian's operator's listener. It says how many are still missing. Wrong secrets make it wait.
    """
    import asyncio

    from keyquorum_custodian.admin import fetch_status, send_secret

    with refusals(as_json):
        found = asyncio.run(fetch_status(directory))
        if not found["sealed"]:
            raise StateError(Reason.STATE, "this custodian is open: there is nothing to unseal", actual="serving")
        if found["scheme"] == "slip39":
            secret = (
                _share_from(share_file)
                if share_file is not None
                else _ask("Share (33 words)", next_step="Run at a terminal, or use --share-file.")
            )
        elif share_file is not None:
            raise StateError(Reason.SEALED, "this custodian is not sealed under shares", actual=found["scheme"])
        else:
            secret = passphrase_from(passphrase_file)
        answer = asyncio.run(send_secret(directory, secret))
        if answer["open"]:
            asyncio.run(_wait_until(directory, sealed=False))
        if as_json:
            typer.echo(json.dumps(answer))
        elif answer["open"]:
            typer.echo("Unsealed. The custodian serves.")
        else:
            held, needed = answer["shares_held"], answer["shares_needed"]
            minutes = max(1, round((answer["forgotten_at"] - time.time()) / 60))
            typer.echo(
                f"{held} of {needed} shares. {needed - held} more within {minutes} minutes, from other officers."
            )


async def _wait_until(directory: Path, *, sealed: bool) -> None:
    """Until the custodian answers, and is that."""
    import asyncio

    from keyquorum_custodian.admin import fetch_status

    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            if (await fetch_status(directory))["sealed"] is sealed:
                return
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            done = "sealed" if sealed else "unsealed"
            raise UnavailableError(Reason.TIMEOUT, f"the custodian was {done}, and yet does not answer; see its log")
        await asyncio.sleep(0.2)


@sealing_app.command()
def seal(directory: Directory, as_json: Json = False) -> None:
    """Have a running custodian forget its seeds and private keys at once, and serve status only until unsealed.

    Its process gives up all of its memory and begins anew, under the same process id. One that is sealed already
    forgets the shares entered so far.
    """
    import asyncio

    from keyquorum_custodian.admin import send_seal

    with refusals(as_json):
        asyncio.run(send_seal(directory))
        asyncio.run(_wait_until(directory, sealed=True))
        typer.echo(json.dumps({"sealed": True}) if as_json else "Sealed. It serves status only until it is unsealed.")


@sealing_app.command()
def reseal(
    directory: Directory,
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(SCHEMES)}.")],
    passphrase_file: PassphraseFile = None,
    share_file: _ShareFiles = None,
    new_passphrase_file: Annotated[
        Path | None, typer.Option(help="passphrase: a file whose first line is the new one. Otherwise a prompt.")
    ] = None,
    shares: Shares = "",
    share_dir: ShareDirectory = None,
    token: TokenLabel = "",
    pin_file: PinFile = None,
    as_json: Json = False,
) -> None:
    """Change what opens a stopped custodian's keystore: another scheme, another passphrase, new shares, a new key.

    Everything is sealed again under a new key, in one step: if anything fails, what opened it before still does.
    """
    from keyquorum_custodian.config import load_config
    from keyquorum_custodian.keystore import open_keystore
    from keyquorum_custodian.resealing import reseal as seal_again
    from keyquorum_protos.wire.process import harden

    with refusals(as_json):
        harden()
        config = load_config(directory)
        store = open_keystore(config, _present_secret(config, passphrase_file, share_file))
        try:
            before = str(store.scheme)
            wrapping = choose_wrapping(
                to,
                config.id,
                passphrase_file=new_passphrase_file,
                shares=shares,
                share_dir=share_dir,
                token=token,
                module=config.pkcs11_module,
                pin_file=pin_file,
                open_token=store.token,
                environment=False,
            )
            try:
                seal_again(store, wrapping)
            except BaseException:
                say_void(to)
                if wrapping.token is not None and wrapping.token is not store.token:
                    wrapping.token.close()
                raise
        finally:
            store.close()
        out = {"custodian": config.id, "before": before, "scheme": to}
        typer.echo(json.dumps(out) if as_json else f"Custodian {config.id} opens by {to} from now on.")


def _present_secret(config: Any, passphrase_file: Path | None, share_files: Sequence[Path] | None) -> Secret:
    from keyquorum_custodian.sealed_keystore import SealedKeystore
    from keyquorum_custodian.sealing.record import Scheme, SealingRecord, ShareSet
    from keyquorum_custodian.sealing.shares import HeldShares

    sealed = SealedKeystore.open(config.keystore)
    scheme, record = sealed.scheme, sealed.record
    sealed.close()
    if scheme is not Scheme.SLIP39:
        return passphrase_from(passphrase_file)
    by = SealingRecord.parse(record).by
    if not isinstance(by, ShareSet):
        raise MalformedError(Reason.MALFORMED, "the sealing record names no set of shares")
    held = HeldShares(by, time.monotonic)
    for path in share_files or ():
        held.add(_share_from(path))
    while not held.complete:
        held.add(
            _ask(
                f"Share {len(held) + 1} of {by.threshold}, entered by its officer",
                next_step=f"Give --share-file {by.threshold} times, or run at a terminal.",
            )
        )
    return held.words()
