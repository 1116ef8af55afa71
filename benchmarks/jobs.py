"""What a job of a minute costs through keyquorum, against the same job run plainly.

The job is the hydrogen molecule's VQE told to keep computing for ``SECONDS``. ``plain`` is the interpreter run on the
folder; ``keyquorum`` is from the call of ``submit`` to the decrypted result in the owner's hands. Both run alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import keyquorum
from keyquorum_local.cluster import Cluster
from keyquorum_local.demo import example
from keyquorum_local.layout import REGION, create

SECONDS = 60
TARGET = 0.05


def measure(scratch: Path) -> dict[str, object]:
    folder = scratch / "job"
    shutil.copytree(example(), folder)
    parameters = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**parameters, "seconds": SECONDS}))
    output = scratch / "plain"
    output.mkdir()
    layout = create(scratch / "cluster")
    with (
        Cluster(layout),
        keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client,
    ):
        client.key_create("bench")
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "main.py"],
            cwd=folder,
            env={**os.environ, "KEYQUORUM_OUTPUT": str(output)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        plain = time.perf_counter() - started
        started = time.perf_counter()
        submitted = client.submit(folder, key="bench", regions=[REGION])
        client.result(submitted.id).files["result.json"]
        through = time.perf_counter() - started
    return {
        "plain_s": round(plain, 2),
        "keyquorum_s": round(through, 2),
        "overhead": {"measured": round(through / plain - 1, 4), "target": f"under {TARGET}"},
    }
