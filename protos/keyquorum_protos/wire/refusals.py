"""How a command says what was refused, whichever role's command it is."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import NoReturn

from keyquorum_core.errors import KeyquorumError

__all__ = ["refusals", "refuse", "show_refusal"]


@contextlib.contextmanager
def refusals(as_json: bool = False) -> Iterator[None]:
    """Typed errors as :func:`refuse` says them."""
    try:
        yield
    except KeyquorumError as error:
        refuse(error, as_json)


def refuse(error: KeyquorumError, as_json: bool) -> NoReturn:
    """:func:`show_refusal`, then exit status 1."""
    show_refusal(error, as_json)
    raise SystemExit(1) from None


def show_refusal(error: KeyquorumError, as_json: bool) -> None:
    """Text on standard error, or one JSON object on standard output."""
    if as_json:
        print(json.dumps({"error": error.as_dict()}), flush=True)
    else:
        print(error.for_people(), file=sys.stderr, flush=True)
