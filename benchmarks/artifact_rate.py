"""Artifact encryption beside its floor, OpenSSL's AES-256-GCM on one thread, in one run; and memory against size.

Two floors, since two OpenSSLs are at hand: the ``openssl`` command's own speed test (if there is one), and the OpenSSL
inside pyca/cryptography, driven by a bare loop over 1 MiB blocks between buffers made beforehand. Rounds of floor and
artifact alternate, and each figure is the median round, so that a noisy machine disturbs all of them alike.

Sources and sinks here cost nothing: a source that writes nothing, a sink that drops. Decryption needs real ciphertext,
made on the fly by the source; the time spent in there is taken off. "From memory" is what remains with a source that
has to copy, as files do.

    python -m benchmarks.artifact_rate [--total MIB] [--json]
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keyquorum_core.artifact import HEADER_BYTES, SEGMENT_BYTES, decrypt_stream, encrypt_stream

KEY = bytes(range(32))
ASSOCIATED_DATA = b"keyquorum benchmark"
MIB = 1 << 20
ROUNDS = 5
MEMORY_SIZES = (1 * MIB, 64 * MIB, 2048 * MIB)
TARGET_RATIO = 0.7


class NullSink:
    """Takes everything, keeps nothing."""

    def write(self, data: Any, /) -> int:
        return len(data)


class NullSource:
    """``size`` bytes that are whatever the reader's buffer holds: reading costs nothing."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int, /) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), self._left)
        self._left -= count
        return count


class CiphertextSource:
    """The artifact of ``size`` zero bytes, sealed while it is read; ``seconds`` is the time that took."""

    def __init__(self, size: int) -> None:
        self.seconds = 0.0
        self._zeros = memoryview(bytes(SEGMENT_BYTES))
        self._sealed = memoryview(bytearray(SEGMENT_BYTES))
        self._ready = self._sealed[:0]
        salt, prefix = bytes(32), bytes(7)
        self._header = bytes([HEADER_BYTES]) + salt + prefix
        self._cipher = AESGCM(HKDF(SHA256(), 32, salt=salt, info=ASSOCIATED_DATA).derive(KEY))
        self._left = size
        self._segment = -1

    def read(self, size: int, /) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def readinto(self, buffer: memoryview, /) -> int:
        start = time.perf_counter()
        if not len(self._ready):
            self._seal_next()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self.seconds += time.perf_counter() - start
        return count

    def _seal_next(self) -> None:
        if self._segment < 0:
            self._ready = memoryview(self._header)
        elif self._left >= 0:
            room = SEGMENT_BYTES - 16 - (HEADER_BYTES if self._segment == 0 else 0)
            size = min(room, self._left)
            last = self._left <= room
            nonce = bytes(7) + self._segment.to_bytes(4, "big") + bytes([last])
            self._ready = self._sealed[: size + 16]
            self._cipher.encrypt_into(nonce, self._zeros[:size], None, self._ready)
            self._left = -1 if last else self._left - size
        self._segment += 1


def _openssl_speed() -> dict[str, float]:
    """GB/s of ``openssl speed`` on 1 MiB blocks, one thread; empty without the command."""
    command = shutil.which("openssl")
    if command is None:
        return {}
    out = {}
    for direction, options in (("encrypt", []), ("decrypt", ["-decrypt"])):
        arguments = [command, "speed", "-seconds", "1", "-bytes", str(MIB), *options, "-evp", "aes-256-gcm"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
        found = re.search(r"AES-256-GCM\s+([\d.]+)k", done.stdout, re.IGNORECASE)
        if found:
            out[direction] = float(found[1]) * 1e3 / 1e9
    return out


def _timed(action: Callable[[], float], amount: int) -> float:
    """GB/s; ``action`` returns seconds that are not its own."""
    start = time.perf_counter()
    foreign = action()
    return amount / (time.perf_counter() - start - foreign) / 1e9


def _rates(total: int) -> dict[str, float]:
    """Median GB/s of floor and artifact in both directions."""
    cipher = AESGCM(KEY)
    plain, sealed, nonce = bytearray(MIB), bytearray(MIB + 16), bytes(12)
    cipher.encrypt_into(nonce, plain, None, sealed)
    blocks = max(1, total // MIB)
    stored = io.BytesIO()
    encrypt_stream(KEY, io.BytesIO(bytes(min(total, 64 * MIB))), stored, ASSOCIATED_DATA)

    def floor_encrypt() -> float:
        for _ in range(blocks):
            cipher.encrypt_into(nonce, plain, None, sealed)
        return 0.0

    def floor_decrypt() -> float:
        for _ in range(blocks):
            cipher.decrypt_into(nonce, sealed, None, plain)
        return 0.0

    def artifact_encrypt() -> float:
        encrypt_stream(KEY, NullSource(total), NullSink(), ASSOCIATED_DATA)
        return 0.0

    def artifact_decrypt() -> float:
        source = CiphertextSource(total)
        decrypt_stream(KEY, source, NullSink(), ASSOCIATED_DATA)
        return source.seconds

    def decrypt_from_memory() -> float:
        stored.seek(0)
        decrypt_stream(KEY, stored, NullSink(), ASSOCIATED_DATA)
        return 0.0

    actions: dict[str, tuple[Callable[[], float], int]] = {
        "floor_encrypt": (floor_encrypt, blocks * MIB),
        "encrypt": (artifact_encrypt, total),
        "floor_decrypt": (floor_decrypt, blocks * MIB),
        "decrypt": (artifact_decrypt, total),
        "decrypt_from_memory": (decrypt_from_memory, len(stored.getbuffer())),
    }
    rounds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, (action, amount) in actions.items():
            rounds[name].append(_timed(action, amount))
    return {name: statistics.median(values) for name, values in rounds.items()}


def _peak_kib() -> int:
    """This process's peak resident memory, KiB: Linux's VmHWM, which a new program starts afresh."""
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status")


def _memory_in_here(size: int) -> dict[str, int]:
    """Growth of the peak by an encryption, and by that and a decryption with its source's own 1 MiB buffer."""
    CiphertextSource(1)  # loads OpenSSL
    before = _peak_kib()
    encrypt_stream(KEY, NullSource(size), NullSink(), ASSOCIATED_DATA)
    after_encrypt = _peak_kib()
    decrypt_stream(KEY, CiphertextSource(size), NullSink(), ASSOCIATED_DATA)
    return {"encrypt_kib": after_encrypt - before, "decrypt_kib": _peak_kib() - before}


def _memory(size: int) -> dict[str, int] | None:
    """The same in a process of its own; None where the kernel keeps no VmHWM."""
    if not Path("/proc/self/status").exists():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.artifact_rate", "--memory", str(size)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=Path(__file__).resolve().parent.parent,
    )
    result: dict[str, int] = json.loads(done.stdout)
    return result


def measure(total_bytes: int = 512 * MIB) -> dict[str, Any]:
    """Rates in GB/s (10⁹ bytes), ratios to both floors, and KiB by which memory peaks at 1 MiB, 64 MiB and 2 GiB."""
    rates = _rates(total_bytes)
    openssl = _openssl_speed()
    ratios = {}
    for direction in ("encrypt", "decrypt"):
        ratios[f"{direction}_to_cryptography_openssl"] = rates[direction] / rates[f"floor_{direction}"]
        if direction in openssl:
            ratios[f"{direction}_to_openssl_speed"] = rates[direction] / openssl[direction]
    return {
        "total_bytes": total_bytes,
        "encrypt_gb_per_s": rates["encrypt"],
        "decrypt_gb_per_s": rates["decrypt"],
        "decrypt_from_memory_gb_per_s": rates["decrypt_from_memory"],
        "floor": {
            "cryptography_openssl_encrypt_gb_per_s": rates["floor_encrypt"],
            "cryptography_openssl_decrypt_gb_per_s": rates["floor_decrypt"],
            "openssl_speed_encrypt_gb_per_s": openssl.get("encrypt"),
            "openssl_speed_decrypt_gb_per_s": openssl.get("decrypt"),
        },
        "ratio": ratios,
        "lowest_ratio": min(ratios.values()),
        "target_ratio": TARGET_RATIO,
        "peak_memory_growth": {f"{size // MIB} MiB": _memory(size) for size in MEMORY_SIZES},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Artifact encryption beside OpenSSL's AES-256-GCM.")
    parser.add_argument("--total", type=int, default=512, metavar="MIB", help="plaintext per round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory", type=int, metavar="BYTES", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory is not None:
        print(json.dumps(_memory_in_here(arguments.memory)))
        return 0
    result = measure(arguments.total * MIB)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return 0
    floor = result["floor"]
    for direction in ("encrypt", "decrypt"):
        print(f"{direction}: {result[f'{direction}_gb_per_s']:6.2f} GB/s")
        for name in ("cryptography_openssl", "openssl_speed"):
            if floor[f"{name}_{direction}_gb_per_s"] is not None:
                rate, ratio = floor[f"{name}_{direction}_gb_per_s"], result["ratio"][f"{direction}_to_{name}"]
                print(f"    {name:<22} {rate:6.2f} GB/s, ratio {ratio:.2f} (target {TARGET_RATIO})")
    print(f"decrypt from memory, copy included: {result['decrypt_from_memory_gb_per_s']:.2f} GB/s")
    for size, growth in result["peak_memory_growth"].items():
        print(f"peak memory growth at {size:>8}: {growth or 'not measured on this system'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
