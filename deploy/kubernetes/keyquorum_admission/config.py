"""admission.toml: which runtime classes, nodes and images count as confidential, and the worker that is put in.

Read strictly: an unknown member is refused, so that a misspelt rule is never silently a missing rule. Paths are
relative to the file's folder. docs/kubernetes.md shows the whole file.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from keyquorum_core.errors import MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.strictjson import Fields

__all__ = ["DIGEST", "PINNED", "ListenConfig", "Settings", "WorkerConfig", "load_config", "parse_config", "read_file"]

PINNED: Final = re.compile(r"[a-z0-9][A-Za-z0-9._:/-]{0,254}@(sha256:[0-9a-f]{64})", re.ASCII)
"""An image by digest; the group is the digest."""
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_MAX_CONFIG: Final = 256 << 10
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII)
_LABEL: Final = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
_QUANTITY: Final = re.compile(r"[1-9][0-9]{0,8}(m|Ki|Mi|Gi|Ti|k|M|G|T)?", re.ASCII)
_MEMORY: Final = re.compile(r"([1-9][0-9]{0,5})(Mi|Gi|Ti)", re.ASCII)
_ADDRESS: Final = re.compile(r"(?:\[[0-9a-fA-F:]{2,45}\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}", re.ASCII)
_KEY_NAMES: Final = (
    r"(^|_)(SESSION|JOB|DATA|ENCRYPTION|DECRYPTION|MASTER|PRIVATE|SECRET|WRAPPING|ROOT|BUNDLE|RESULT|AES)_?KEY(_|$)",
    r"(^|_)(KEK|DEK|SEED|PASSPHRASE|PASSWORD)(_|$)",
    r"^(KEYQUORUM_)?KEY(_(B64|BASE64|HEX))?$",
)


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Where the webhook is served. Paths are absolute; ``reload_seconds``: how often the TLS files are looked at."""

    host: str
    port: int
    certificate: Path
    key: Path
    reload_seconds: int
    grace_seconds: int


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The container that is put in. ``memory`` is the size of its folder in memory, a canonical Kubernetes quantity."""

    image: str
    digests: frozenset[str]
    config_map: str
    tls_secret: str
    memory: str
    run_as_user: int
    limits: dict[str, str]
    requests: dict[str, str]


@dataclass(frozen=True, slots=True)
class Settings:
    """What decisions are made by; nothing of where they are served.

    ``runtime_classes``: the first one is given to pods that name none. ``other_digests``: of containers beside the
    worker; None allows any digest. ``runtime_annotations``: annotations for the container runtime that pods may have.
    """

    runtime_classes: tuple[str, ...]
    node_selector: dict[str, str]
    other_digests: frozenset[str] | None
    key_names: tuple[re.Pattern[str], ...]
    runtime_annotations: frozenset[str]
    worker: WorkerConfig

    def names_a_key(self, variable: str) -> bool:
        """Whether an environment variable's name says that its value is key material. An oversized name does."""
        return len(variable) > 1024 or any(pattern.search(variable) for pattern in self.key_names)


def read_file(path: Path, what: str, max_bytes: int) -> bytes:
    """Raises ``NOT_FOUND``, ``TOO_LARGE`` or ``STORAGE``."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise StateError(Reason.NOT_FOUND, f"{what} is not there", expected=str(path)) from None
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{what} cannot be read", actual=f"{error.strerror}: {path}") from None
    if len(data) > max_bytes:
        raise MalformedError(Reason.TOO_LARGE, f"{what} is too large", expected=f"at most {max_bytes} bytes")
    return data


def load_config(path: Path) -> tuple[ListenConfig, Settings]:
    """Read admission.toml. Raises as :func:`read_file` and :func:`parse_config` do."""
    return parse_config(read_file(path, "the configuration", _MAX_CONFIG), path.absolute().parent)


def parse_config(data: bytes, base: Path) -> tuple[ListenConfig, Settings]:
    """Raises :class:`MalformedError` naming the member."""
    try:
        parsed = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MalformedError(Reason.MALFORMED, "the configuration is not TOML", actual=str(error)[:200]) from None
    fields = Fields(parsed, "admission.toml")
    host, port = _address(fields.text("listen", max_length=300))
    listen = ListenConfig(
        host=host,
        port=port,
        certificate=base / fields.text("tls_certificate", max_length=4096),
        key=base / fields.text("tls_key", max_length=4096),
        reload_seconds=fields.integer("reload_seconds", 1, 3600) if "reload_seconds" in fields else 10,
        grace_seconds=fields.integer("grace_seconds", 1, 600) if "grace_seconds" in fields else 10,
    )
    classes = _names(fields, "runtime_classes", 64)
    selector = _map(fields.object("node_selector"), "node_selector", _LABEL_VALUE, minimum=1)
    patterns = fields.texts("key_names", max_items=64) if "key_names" in fields else _KEY_NAMES
    annotations = fields.texts("runtime_annotations", max_items=64) if "runtime_annotations" in fields else ()
    others = _other_digests(fields)
    worker = _worker(fields.object("worker"))
    fields.done()
    return listen, Settings(
        runtime_classes=classes,
        node_selector=selector,
        other_digests=others,
        key_names=tuple(_pattern(each) for each in patterns),
        runtime_annotations=frozenset(annotations),
        worker=worker,
    )


def _worker(fields: Fields) -> WorkerConfig:
    image = fields.text("image", max_length=400)
    pinned = PINNED.fullmatch(image)
    if pinned is None:
        _fail("worker.image", "an image by digest: name@sha256:…", image)
    digests = _digests(fields.texts("digests", max_items=64, min_items=1), "worker.digests")
    if pinned[1] not in digests:
        _fail("worker.image", "a digest that worker.digests lists", pinned[1])
    memory = fields.text("memory", max_length=16)
    size = _MEMORY.fullmatch(memory)
    if size is None or (size[2] != "Ti" and int(size[1]) % 1024 == 0):
        _fail("worker.memory", "a size such as 512Mi or 4Gi, in the largest unit that divides it", memory)
    worker = WorkerConfig(
        image=image,
        digests=digests,
        config_map=_name(fields.text("config_map"), "worker.config_map"),
        tls_secret=_name(fields.text("tls_secret"), "worker.tls_secret"),
        memory=memory,
        run_as_user=fields.integer("run_as_user", 0, 2**31 - 1),
        limits=_map(fields.object("limits"), "worker.limits", _QUANTITY, minimum=1),
        requests=_map(fields.object("requests"), "worker.requests", _QUANTITY) if "requests" in fields else {},
    )
    fields.done()
    return worker


def _other_digests(fields: Fields) -> frozenset[str] | None:
    """``other_images = "pinned"`` or a list of digests."""
    value = fields.raw("other_images")
    if value == "pinned":
        return None
    if not isinstance(value, list) or len(value) > 4096:
        _fail("other_images", '"pinned" or a list of digests', type(value).__name__)
    return _digests(tuple(str(each) for each in value), "other_images")


def _digests(values: tuple[str, ...], what: str) -> frozenset[str]:
    for value in values:
        if not DIGEST.fullmatch(value):
            _fail(what, "digests: sha256: and 64 lower-case hex digits", value)
    return frozenset(values)


def _names(fields: Fields, name: str, maximum: int) -> tuple[str, ...]:
    values = fields.texts(name, max_items=maximum, min_items=1)
    return tuple(_name(value, name) for value in values)


def _name(value: str, what: str) -> str:
    if not _NAME.fullmatch(value):
        _fail(what, "the name of a Kubernetes object", value)
    return value


def _map(fields: Fields, what: str, values: re.Pattern[str], minimum: int = 0) -> dict[str, str]:
    found = {}
    for name in fields.names():
        if not _LABEL.fullmatch(name):
            _fail(what, "names such as example.com/name", name)
        value = fields.text(name, allow_empty=True)
        if not values.fullmatch(value):
            _fail(f"{what}.{name}", "a value as Kubernetes writes it", value)
        found[name] = value
    if len(found) < minimum:
        _fail(what, f"at least {minimum} entry", "none")
    return found


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE | re.ASCII)
    except (re.error, RecursionError, OverflowError):
        _fail("key_names", "regular expressions", text)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not _ADDRESS.fullmatch(text) or int(port) > 65535:
        _fail("listen", "host:port", text)
    return host.strip("[]"), int(port)


def _fail(name: str, expected: str, actual: str) -> NoReturn:
    raise MalformedError(
        Reason.MALFORMED, f"admission.toml: bad member {name!r}", expected=expected, actual=actual[:100] or "nothing"
    )
