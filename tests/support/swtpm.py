"""A real TPM 2.0 in software: swtpm, manufactured with an EK certificate by a CA of its own, driven by tpm2-tools.

Each :class:`Swtpm` is one process that listens on Unix sockets in its own folder, and is ended by :meth:`Swtpm.stop`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["AttestationKey", "Manufacturer", "Swtpm", "require_pytss"]

_PROGRAMS = ("swtpm", "swtpm_setup", "swtpm_localca", "swtpm_ioctl", "tpm2_quote", "tpm2_activatecredential")
_SECONDS = 60
EK_HANDLES = {"rsa": "0x81010001", "ecc": "0x81010016"}
"""Where ``swtpm_setup`` leaves its endorsement keys: RSA-2048, and ECC on P-384."""


def require_swtpm() -> None:
    """Skip the test, saying why, where a program is absent."""
    missing = [each for each in _PROGRAMS if shutil.which(each) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install swtpm, swtpm-tools and tpm2-tools")


def require_pytss() -> None:
    """Skip the test, saying why, where the worker's own way to a TPM is absent."""
    require_swtpm()
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    try:
        importlib.import_module("tpm2_pytss")
    except ImportError:
        pytest.skip("no tpm2-pytss: it needs a C compiler and libtss2-dev (scripts/system_packages.sh)")


def _run(arguments: Sequence[str | Path], folder: Path, **environment: str) -> bytes:
    done = subprocess.run(
        [str(each) for each in arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{arguments[0]}: {done.stderr.decode(errors='replace')[-800:]}")
    return done.stdout


class Manufacturer:
    """A maker of TPMs: a root and an issuing CA, both made by ``swtpm_localca`` with the first TPM."""

    def __init__(self, folder: Path) -> None:
        require_swtpm()
        self.folder = folder
        state = folder / "ca"
        state.mkdir(parents=True)
        options = folder / "localca.options"
        options.write_text("--platform-manufacturer keyquorum\n--platform-version 1\n--platform-model test\n")
        authority = folder / "localca.conf"
        authority.write_text(
            f"statedir = {state}\nsigningkey = {state}/signkey.pem\nissuercert = {state}/issuercert.pem\n"
            f"certserial = {state}/certserial\n"
        )
        (folder / "setup.conf").write_text(
            f"create_certs_tool = {shutil.which('swtpm_localca')}\n"
            f"create_certs_tool_config = {authority}\ncreate_certs_tool_options = {options}\n"
        )

    @property
    def certificates(self) -> tuple[bytes, bytes]:
        """Issuing CA and root, PEM."""
        state = self.folder / "ca"
        return (state / "issuercert.pem").read_bytes(), (state / "swtpm-localca-rootca-cert.pem").read_bytes()

    def make(self, name: str) -> Swtpm:
        """Manufacture a TPM and power it on."""
        folder = self.folder / name
        (folder / "state").mkdir(parents=True)
        _run(
            [
                *("swtpm_setup", "--tpm2", "--tpmstate", folder / "state", "--create-ek-cert"),
                *("--config", self.folder / "setup.conf", "--pcr-banks", "sha1,sha256,sha384"),
                *("--write-ek-cert-files", folder),
            ],
            folder,
        )
        return Swtpm(folder)


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """An AK below the EK, kept in the TPM at a persistent handle."""

    handle: str
    area: bytes
    """``TPM2B_PUBLIC``."""
    pem: str
    name: bytes
    scheme: str
    hash_name: str


class Swtpm:
    """A powered TPM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys = 0
        self._tcti = f"swtpm:path={folder}/tpm"
        self._process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}/state"),
                *("--server", f"type=unixio,path={folder}/tpm", "--ctrl", f"type=unixio,path={folder}/tpm.ctrl"),
                *("--flags", "not-need-init,startup-clear"),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while not (folder / "tpm").exists() or not (folder / "tpm.ctrl").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError("swtpm did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the process that this object started."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def tool(self, *arguments: str | Path) -> bytes:
        return _run(arguments, self.folder, TPM2TOOLS_TCTI=self._tcti)

    def reset(self, *, orderly: bool = True) -> None:
        """Power it off, announced or not, and on again."""
        if orderly:
            self.tool("tpm2_shutdown", "--clear")
        _run(["swtpm_ioctl", "--unix", self.folder / "tpm.ctrl", "-i"], self.folder)
        self.tool("tpm2_startup", "--clear")

    def extend(self, pcr: int, digest: bytes, bank: str = "sha256") -> None:
        self.tool("tpm2_pcrextend", f"{pcr}:{bank}={digest.hex()}")

    def pcrs(self, indices: Sequence[int], bank: str = "sha256") -> dict[int, bytes]:
        out: dict[int, bytes] = {}
        text = self.tool("tpm2_pcrread", f"{bank}:{','.join(map(str, indices))}").decode()
        for line in text.splitlines():
            index, colon, value = line.partition(": 0x")
            if colon:
                out[int(index)] = bytes.fromhex(value)
        return out

    def ek_certificate(self, kind: str = "rsa") -> bytes:
        """DER, as the TPM holds it."""
        return next(self.folder.glob(f"ek-{'rsa' if kind == 'rsa' else 'secp'}*.crt")).read_bytes()

    def ek_public(self, kind: str = "rsa") -> bytes:
        """``TPM2B_PUBLIC``."""
        self.tool("tpm2_readpublic", "-c", EK_HANDLES[kind], "-o", "ek.pub")
        return (self.folder / "ek.pub").read_bytes()

    def create_ak(self, algorithm: str = "rsa", scheme: str = "rsassa", hash_name: str = "sha256") -> AttestationKey:
        """An AK below the RSA EK."""
        self._keys += 1
        stem = f"ak{self._keys}"
        handle = f"0x8101{0x100 + self._keys:04x}"
        files = {each: self.folder / f"{stem}.{each}" for each in ("ctx", "pub", "name", "pem")}
        self.tool(
            *("tpm2_createak", "-C", EK_HANDLES["rsa"], "-c", files["ctx"], "-G", algorithm, "-g", hash_name),
            *("-s", scheme, "-u", files["pub"], "-n", files["name"]),
        )
        self.tool("tpm2_readpublic", "-c", files["ctx"], "-f", "pem", "-o", files["pem"])
        self.tool("tpm2_evictcontrol", "-C", "o", "-c", files["ctx"], handle)
        self.tool("tpm2_flushcontext", "-t")
        return AttestationKey(
            handle, files["pub"].read_bytes(), files["pem"].read_text(), files["name"].read_bytes(), scheme, hash_name
        )

    def activate(self, ak: AttestationKey, credential_file: bytes, kind: str = "rsa") -> bytes:
        """The secret in a credential. Raises :class:`AssertionError` where the TPM refuses."""
        (self.folder / "credential").write_bytes(credential_file)
        activate = ("tpm2_activatecredential", "-c", ak.handle, "-C", EK_HANDLES[kind], "-i", "credential")
        if kind == "ecc":  # its template lets an empty password in; the RSA one asks for a policy session
            self.tool(*activate, "-o", "secret")
            return (self.folder / "secret").read_bytes()
        self.tool("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
        try:
            self.tool("tpm2_policysecret", "-S", "session.ctx", "-c", "e")
            self.tool(*activate, "-o", "secret", "-P", "session:session.ctx")
        finally:
            self.tool("tpm2_flushcontext", "session.ctx")
        return (self.folder / "secret").read_bytes()

    def quote(
        self, ak: AttestationKey, extra_data: bytes, indices: Sequence[int], *, bank: str = "sha256", form: str = "tss"
    ) -> tuple[bytes, bytes]:
        """``TPMS_ATTEST``, and the signature as ``TPMT_SIGNATURE`` (``tss``) or bare (``plain``)."""
        self.tool(
            *("tpm2_quote", "-c", ak.handle, "-l", f"{bank}:{','.join(map(str, indices))}", "-q", extra_data.hex()),
            *("-m", "quote", "-s", "signature", "-f", form, "--scheme", ak.scheme, "-g", ak.hash_name),
        )
        return (self.folder / "quote").read_bytes(), (self.folder / "signature").read_bytes()

    def boot(self, measurements: Mapping[int, bytes]) -> None:
        """What a machine's firmware would measure."""
        for pcr, digest in measurements.items():
            self.extend(pcr, digest)
