"""A rewrap killed at every change it makes to the disk: the file is the old one or the new one, whole."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from keyquorum.data_keys import read_header
from keyquorum_core.data_file import PREAMBLE_BYTES
from tests.support.data_files import data_key
from tests.support.dying_rewrap import ORIGINAL, SEALED

ROOT = Path(__file__).parents[2]
PLAINTEXT = bytes(range(256)) * 10_000


def test_at_any_kill_the_file_is_whole_and_a_rerun_ends_what_was_begun(tmp_path: Path) -> None:
    with data_key(1) as old:
        old.encrypt(io.BytesIO(PLAINTEXT), tmp_path / ORIGINAL)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.dying_rewrap", str(tmp_path)],
        cwd=ROOT,
        timeout=110,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    original = (tmp_path / ORIGINAL).read_bytes()
    graves = sorted(each for each in tmp_path.iterdir() if each.is_dir())
    # A name, the preamble, three pieces of the artifact, two syncs, a rename; and those that nobody killed.
    assert len([each for each in graves if not each.name.startswith("done")]) == 2 * 8
    found = set()
    for grave in graves:
        sealed = grave / SEALED
        epoch = read_header(sealed).header.epoch
        found.add(epoch)
        assert sealed.read_bytes()[PREAMBLE_BYTES:] == original[PREAMBLE_BYTES:]
        assert epoch == 1 or not grave.name.startswith("01")
        assert epoch == 2 or not grave.name.startswith("done")
        with data_key(1) as old, data_key(2) as new:
            if epoch == 1:
                assert sealed.read_bytes() == original
                old.rewrap(sealed, new)
            out = io.BytesIO()
            new.decrypt(sealed, out)
        assert out.getvalue() == PLAINTEXT
    assert found == {1, 2}
