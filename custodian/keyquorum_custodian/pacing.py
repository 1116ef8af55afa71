"""How a ceremony's step does what takes long: beside the thread that serves, never in it.

A step is a coroutine. What only computes (signatures, sealed blobs, thousands of seeds) it hands to its :class:`Work`;
what reads or writes the keystore it does itself, in the keystore's thread, where no release is served meanwhile and no
other step of the same key. With :func:`on_the_spot` it never waits, and :func:`at_once` runs it like a function.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

__all__ = ["Beside", "Work", "at_once", "on_the_spot"]

P = ParamSpec("P")
T = TypeVar("T")


class Work(Protocol):
    """Calls a function that touches nothing but its arguments, and gives what it returns or raises."""

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


async def on_the_spot(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    return function(*args, **kwargs)


def at_once(step: Coroutine[Any, Any, T]) -> T:
    """What a step returns whose work is done on the spot."""
    try:
        step.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    step.close()
    raise RuntimeError("a step waited for something, though its work is done on the spot")


class Beside:
    """One thread for all ceremonies: however many are under way, they take one core and leave the serving thread its
    turns. A step that its caller gave up on ends before anything of it is stored."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ceremonies")

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Returns once nothing of it runs any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)
