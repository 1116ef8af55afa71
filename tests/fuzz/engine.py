"""One target under atheris: ``python -m tests.fuzz.engine TARGET FOLDER LIBFUZZER-OPTION …``.

Our own code is instrumented for coverage as it is imported, so this module imports none of it before.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import atheris


def main() -> None:
    name, folder, *options = sys.argv[1:]
    warnings.simplefilter("ignore")  # X.509 parsers warn about what they then refuse
    with atheris.instrument_imports(include=["keyquorum_core", "keyquorum_admission"]):
        from tests.fuzz.table import TARGETS
    target = TARGETS[name]
    seeds, corpus = Path(folder, "seeds"), Path(folder, "corpus")
    for each in (seeds, corpus):
        each.mkdir(parents=True, exist_ok=True)
    for old in seeds.iterdir():
        old.unlink()  # of a vendor that is gone
    for number, data in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(data)
    atheris.Setup(
        [sys.argv[0], str(corpus), str(seeds), f"-max_len={target.max_length}", *options],
        lambda data: target.accepts(data),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
