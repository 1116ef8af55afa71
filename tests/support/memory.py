"""Reading another process's memory, as somebody who owns its machine would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def can_read_memory(pid: int) -> bool:
    try:
        with Path(f"/proc/{pid}/mem").open("rb"):
            return True
    except OSError:
        return False


def find_in_memory(pid: int, needles: Mapping[str, bytes]) -> set[str]:
    """Names of the needles that stand anywhere in the process's readable, writable mappings."""
    found: set[str] = set()
    longest = max(len(needle) for needle in needles.values())
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for start, end in _mappings(pid):
            tail = b""
            at = start
            while at < end:
                memory.seek(at)
                try:
                    data = memory.read(min(4 << 20, end - at))
                except OSError:  # a mapping that the kernel does not let out, such as [vvar]
                    break
                if not data:
                    break
                block = tail + data
                found |= {name for name, needle in needles.items() if needle in block}
                tail = block[-longest:]
                at += len(data)
    return found


def _mappings(pid: int) -> Iterable[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        if permissions.startswith("rw"):
            start, end = (int(part, 16) for part in span.split("-"))
            yield start, end


def find_in_files(folder: Path, needles: Mapping[str, bytes]) -> set[str]:
    """Names of the needles that stand in any file below ``folder``."""
    found: set[str] = set()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            found |= {name for name, needle in needles.items() if needle in data}
    return found
