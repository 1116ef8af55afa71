"""A custodian that leaves the ledger out of its gate, so that what the ledger costs can be measured. No product has it.

``python -m benchmarks.ungated DIR`` serves a custodian's folder; the passphrase comes in ``KEYQUORUM_PASSPHRASE``.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from keyquorum_custodian import gate, logs
from keyquorum_custodian.node import open_node
from keyquorum_custodian.server import serve

if __name__ == "__main__":
    gate.CHECKS = tuple(each for each in gate.CHECKS if each[0] != "ledger")  # type: ignore[misc]
    logs.configure("warning")
    node = open_node(Path(sys.argv[1]), os.environ.pop("KEYQUORUM_PASSPHRASE"))
    asyncio.run(serve(node, lambda line: print(line, flush=True)))
