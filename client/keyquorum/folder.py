"""A job as a folder: its files are the bundle, its ``job.toml`` says how to run them and is no part of the bundle.

::

    entrypoint = ["python", "main.py"]
    classification = "research"
    export_control = ""
    regions = ["eu"]
    evidence = ["sev-snp"]
    purposes = ["chemistry"]

    [resources]
    cpus = 1
    memory_mib = 1024
    gpus = 0
    wall_seconds = 600
    output_mib = 64

Every member is optional; what the caller passes goes before what stands there. Hidden files (``.git``, ``.env``) and
``__pycache__`` stay behind; a link or device is refused rather than followed or dropped.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from keyquorum_core.bundle import BundleLimits
from keyquorum_core.bundle_names import NameSet, split_name
from keyquorum_core.errors import MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.manifest import Resources, Subject
from keyquorum_core.strictjson import Fields
from keyquorum_protos.wire.files import read_bytes

__all__ = ["FolderFile", "JobFolder", "JobSettings", "read_folder"]

SETTINGS_FILE = "job.toml"
_DEFAULT_RESOURCES = Resources(cpus=1, memory_mib=1024, gpus=0, wall_seconds=3600, output_mib=256)


@dataclass(frozen=True, slots=True)
class JobSettings:
    """How to run a job. Empty ``entrypoint``, ``classification`` and ``regions`` mean "not said"."""

    entrypoint: tuple[str, ...] = ()
    classification: str = ""
    export_control: str = ""
    regions: tuple[str, ...] = ()
    evidence_types: tuple[str, ...] = ("sev-snp",)
    purposes: tuple[str, ...] = ()
    resources: Resources = field(default=_DEFAULT_RESOURCES)

    def overridden(
        self,
        *,
        entrypoint: Sequence[str] | None = None,
        classification: str | None = None,
        export_control: str | None = None,
        regions: Sequence[str] | None = None,
        evidence_types: Sequence[str] | None = None,
        purposes: Sequence[str] | None = None,
        resources: Resources | None = None,
    ) -> JobSettings:
        """With what the caller passed in place of what the folder says, complete or refused."""
        changes: dict[str, object] = {
            "entrypoint": None if entrypoint is None else tuple(entrypoint),
            "classification": classification,
            "export_control": export_control,
            "regions": None if regions is None else tuple(regions),
            "evidence_types": None if evidence_types is None else tuple(evidence_types),
            "purposes": None if purposes is None else tuple(purposes),
            "resources": resources,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        out = replace(self, **given)  # type: ignore[arg-type]
        for name in ("entrypoint", "classification", "regions"):
            if not getattr(out, name):
                raise MalformedError(
                    Reason.MALFORMED,
                    f"the job has no {name}",
                    expected=f"{name} in {SETTINGS_FILE} or as an argument",
                    actual="nothing",
                )
        return out


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file to go into the bundle: relative POSIX name, path, size in bytes."""

    name: str
    path: Path
    size: int
    executable: bool

    def open(self) -> io.BufferedReader:
        """The open file. Never follows a link that took the file's place since the folder was read."""
        return os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


@dataclass(frozen=True, slots=True)
class JobFolder:
    """What was found: files sorted by name, and the folder's settings."""

    root: Path
    files: tuple[FolderFile, ...]
    settings: JobSettings

    def subjects(self) -> tuple[Subject, ...]:
        """Names and SHA-256 of the files: the manifest's subjects. Reads every file once."""
        out = []
        for file in self.files:
            try:
                with file.open() as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
            except OSError as error:
                raise UnavailableError(Reason.STORAGE, f"{file.path} can't be read", actual=error.strerror) from None
            out.append(Subject(file.name, digest))
        return tuple(out)


def read_folder(path: Path) -> JobFolder:
    """Raises :class:`UnavailableError` for a folder that is not there, :class:`RefusedError` (``BUNDLE``) for one that
    holds nothing or what a bundle can't, :class:`MalformedError` for a bad job.toml."""
    if not path.is_dir():
        raise UnavailableError(Reason.NOT_FOUND, "the job's folder is missing", expected=f"a folder {path}")
    files = tuple(sorted(_walk(path, path), key=lambda file: file.name.encode("utf-8", "surrogateescape")))
    if not files:
        raise RefusedError(Reason.BUNDLE, f"{path} holds no files to run")
    _check_bundle(files)
    settings = path / SETTINGS_FILE
    return JobFolder(path, files, _read_settings(settings) if settings.exists() else JobSettings())


def _check_bundle(files: Sequence[FolderFile]) -> None:
    """What :func:`keyquorum_core.bundle.write_bundle` will refuse, refused before a manifest is signed or a custodian
    asked."""
    limits = BundleLimits()
    for what, most, actual in (
        ("files", limits.max_files, len(files)),
        ("bytes in one file", limits.max_file_bytes, max(file.size for file in files)),
        ("bytes in all", limits.max_total_bytes, sum(file.size for file in files)),
    ):
        if actual > most:
            raise RefusedError(
                Reason.BUNDLE,
                "the folder is over the limits of a bundle",
                expected=f"at most {most} {what}",
                actual=f"{actual} {what}",
            )
    names = NameSet()
    for file in files:
        names.add(file.name)
        split_name(file.name)


def _walk(root: Path, folder: Path) -> Iterator[FolderFile]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{folder} can't be read", actual=error.strerror) from None
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(".") or entry.name == "__pycache__" or path == root / SETTINGS_FILE:
            continue
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(root, path)
        elif stat.S_ISREG(found.st_mode):
            name = path.relative_to(root).as_posix()
            yield FolderFile(name, path, found.st_size, bool(found.st_mode & 0o100))
        else:
            raise RefusedError(
                Reason.BUNDLE,
                f"{path} is neither a file nor a folder",
                expected="files and folders only",
                actual="a symbolic link" if stat.S_ISLNK(found.st_mode) else "a special file",
                next_step="Put a copy in its place, or take it out of the folder",
            )


def _read_settings(path: Path) -> JobSettings:
    what = SETTINGS_FILE
    try:
        parsed = tomllib.loads(read_bytes(path, what).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MalformedError(Reason.MALFORMED, f"{path} is not TOML", actual=str(error)[:200]) from None
    fields = Fields(parsed, what)
    out = JobSettings()
    if "entrypoint" in fields:
        out = replace(out, entrypoint=fields.texts("entrypoint", min_items=1, max_items=64, max_length=4096))
    if "classification" in fields:
        out = replace(out, classification=fields.text("classification", max_length=32))
    if "export_control" in fields:
        out = replace(out, export_control=fields.text("export_control", max_length=64, allow_empty=True))
    if "regions" in fields:
        out = replace(out, regions=fields.texts("regions", min_items=1, max_items=64))
    if "evidence" in fields:
        out = replace(out, evidence_types=fields.texts("evidence", min_items=1, max_items=16))
    if "purposes" in fields:
        out = replace(out, purposes=fields.texts("purposes", max_items=16))
    if "resources" in fields:
        out = replace(out, resources=_read_resources(fields.object("resources")))
    fields.done()
    return out


def _read_resources(fields: Fields) -> Resources:
    given = {name: fields.integer(name) for name in fields.names() if name in Resources.__dataclass_fields__}
    fields.done()
    return replace(_DEFAULT_RESOURCES, **given)
