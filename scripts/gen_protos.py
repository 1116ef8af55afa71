"""Generate the protobuf and gRPC stubs that stand beside the .proto files; ``--check`` fails when they are not current.

The generator is pinned by requirements.lock, so the same sources give the same stubs everywhere.
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2

ROOT = Path(__file__).resolve().parent.parent / "protos"
PACKAGE = "keyquorum_protos/v1"


def generate(out: Path) -> None:
    """Write all stubs below ``out``. Raises :class:`subprocess.CalledProcessError` when protoc refuses."""
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / PACKAGE).glob("*.proto"))
    wellknown = files("grpc_tools").joinpath("_proto")
    googleapis = Path(str(status_pb2.__file__)).parent.parent.parent
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc",
            f"-I{ROOT}", f"-I{wellknown}", f"-I{googleapis}",
            f"--python_out={out}", f"--grpc_python_out={out}",
            f"--mypy_out={out}", f"--mypy_grpc_out={out}",
            f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}",
            *sources,
        ],
        cwd=ROOT,
        check=True,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed stubs and change nothing")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {p.name for p in (Path(scratch) / PACKAGE).iterdir()}
        committed = {p.name for p in (ROOT / PACKAGE).glob("*_pb2*")}
        stale = sorted(fresh ^ committed)
        for name in sorted(fresh & committed):
            if not filecmp.cmp(Path(scratch) / PACKAGE / name, ROOT / PACKAGE / name, shallow=False):
                stale.append(name)
    if stale:
        print(f"generated stubs are not current: {', '.join(stale)}. Run `make protos` and commit.", file=sys.stderr)
        return 1
    print("generated stubs are current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
