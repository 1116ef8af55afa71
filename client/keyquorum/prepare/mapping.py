"""The sealed mapping: which token stands for which value, for nobody but the owner (docs/spec/provenance.md).

``"keyquorum-mapping-v1\\n" ‖ u32be(length) ‖ header ‖ artifact``: the header is RFC 8785 JSON and says under which key
the rest is encrypted; it is the associated data of the artifact (docs/spec/artifact.md), whose key is the purpose key
``mapping``. The plaintext is an Arrow IPC stream of ``domain``, ``token``, ``value``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.ipc as ipc

from keyquorum_core import jcs
from keyquorum_core.artifact import DecryptingReader, EncryptingWriter
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import KEY_ID, PRINCIPAL, check
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import transcript

__all__ = ["MappingHeader", "MappingWriter", "read_header", "read_mapping"]

MAGIC: Final = b"keyquorum-mapping-v1\n"
_MAX_HEADER: Final = 4096
_SCHEMA: Final = pa.schema([("domain", pa.string()), ("token", pa.string()), ("value", pa.string())])


@dataclass(frozen=True, slots=True)
class MappingHeader:
    """Under which key: what :meth:`Client.derive_key` is asked with; ``name`` is the pipeline's."""

    owner: str
    key_id: str
    epoch: int
    name: str
    classification: str
    export_control: str
    key_check: str

    def to_bytes(self) -> bytes:
        members = {each: getattr(self, each) for each in self.__slots__}
        return jcs.dumps(members)

    @staticmethod
    def parse(data: bytes) -> MappingHeader:
        fields = Fields(loads(data, "mapping header", max_bytes=_MAX_HEADER, max_depth=1), "mapping header")
        header = MappingHeader(
            owner=fields.text("owner"),
            key_id=fields.text("key_id"),
            epoch=fields.integer("epoch"),
            name=fields.text("name"),
            classification=fields.text("classification"),
            export_control=fields.text("export_control", allow_empty=True),
            key_check=fields.hex("key_check", 16).hex(),
        )
        fields.done()
        check(PRINCIPAL, header.owner, "owner name")
        check(KEY_ID, header.key_id, "key id")
        check(KEY_ID, header.name, "pipeline name")
        if header.to_bytes() != data:
            raise MalformedError(Reason.MALFORMED, "the mapping's header is not canonical", expected="RFC 8785 JSON")
        return header


def _bound(header: bytes) -> bytes:
    return transcript("keyquorum/v1/mapping", header)


class MappingWriter:
    """Takes pairs batch by batch; only :meth:`close` makes the file whole."""

    def __init__(self, file: BinaryIO, header: MappingHeader, key: bytes) -> None:
        data = header.to_bytes()
        file.write(MAGIC + len(data).to_bytes(4, "big") + data)
        self._cipher = EncryptingWriter(key, file, _bound(data))
        self._stream = ipc.new_stream(pa.PythonFile(_Writable(self._cipher), mode="w"), _SCHEMA)

    def add(self, domain: str, tokens: list[str], values: Any) -> None:
        """``values``: an Arrow array of strings, as many as tokens."""
        domains = pa.array([domain], pa.string()).take(pa.array([0] * len(tokens), pa.int8()))
        self._stream.write_batch(pa.record_batch([domains, pa.array(tokens, pa.string()), values], schema=_SCHEMA))

    def close(self) -> None:
        self._stream.close()
        self._cipher.close()

    def abort(self) -> None:
        """The file won't be whole. After :meth:`close` this does nothing."""
        self._cipher.abort()


class _Writable(io.RawIOBase):
    def __init__(self, cipher: EncryptingWriter) -> None:
        self._cipher = cipher

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return self._cipher.write(data)


def read_header(file: BinaryIO) -> MappingHeader:
    """The header, UNVERIFIED until :func:`read_mapping` has read to its end. Leaves ``file`` at the artifact."""
    if file.read(len(MAGIC)) != MAGIC:
        raise MalformedError(Reason.MALFORMED, "this is no mapping", expected=repr(MAGIC.decode()))
    size = int.from_bytes(file.read(4), "big")
    if size > _MAX_HEADER:
        raise MalformedError(Reason.TOO_LARGE, "the mapping's header is too large", expected=_MAX_HEADER, actual=size)
    return MappingHeader.parse(file.read(size))


def read_mapping(file: BinaryIO, header: MappingHeader, key: bytes) -> Mapping[str, str]:
    """Value by token, of all domains. Raises :class:`RefusedError` (``ARTIFACT``) unless every byte is the owner's."""
    out: dict[str, str] = {}
    with DecryptingReader(key, file, _bound(header.to_bytes())) as reader:
        try:
            for batch in _batches(reader):
                for token, value in zip(
                    batch.column("token").to_pylist(), batch.column("value").to_pylist(), strict=True
                ):
                    if out.setdefault(token, value) != value:
                        raise RefusedError(Reason.DIGEST, "two values have one token", expected="one value each")
        except (pa.ArrowInvalid, OSError) as error:
            raise MalformedError(Reason.MALFORMED, "the mapping can't be read", actual=str(error)[:120]) from None
        while reader.read(1 << 20):
            raise MalformedError(Reason.MALFORMED, "the mapping goes on after its end", expected="nothing more")
    return out


def _batches(reader: DecryptingReader) -> Iterator[Any]:
    with ipc.open_stream(pa.PythonFile(reader, mode="r")) as stream:
        if stream.schema != _SCHEMA:
            raise MalformedError(Reason.MALFORMED, "the mapping has other columns", expected=str(_SCHEMA.names))
        yield from stream
