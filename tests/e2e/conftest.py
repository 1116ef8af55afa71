"""One local cluster of real processes for the whole end-to-end run, with a key made by the ceremony.

Tests that break something (kill a process, stop a custodian) restore it before they return.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import create
from tests.support.cluster import KEY, Running


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    layout = create(tmp_path_factory.mktemp("cluster") / "local")
    with Cluster(layout) as cluster:
        found = Running(layout, cluster)
        with found.connect() as client:
            client.key_create(KEY)
        yield found


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a small real job: it reads its input, prints a line and writes a result."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "main.py").write_text(
        "import json, os, pathlib, time\n"
        "facts = json.loads(pathlib.Path('input.json').read_text())\n"
        "print('the input says', facts['text'])\n"
        "time.sleep(facts.get('seconds', 0))\n"
        "out = pathlib.Path(os.environ['KEYQUORUM_OUTPUT']) / 'result.json'\n"
        "out.write_text(json.dumps({'echo': facts['text']}))\n"
    )
    (folder / "input.json").write_text('{"text": "a secret of the owner 4711"}')
    (folder / "job.toml").write_text(
        'entrypoint = ["python", "main.py"]\nclassification = "research"\nevidence = ["sev-snp"]\n'
        "[resources]\ncpus = 1\nmemory_mib = 512\ngpus = 0\nwall_seconds = 120\noutput_mib = 8\n"
    )
    return folder
