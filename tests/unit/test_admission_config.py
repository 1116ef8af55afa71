"""admission.toml: strict, and every bad member named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keyquorum_admission.config import load_config, parse_config
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support.admission import CONFIG, WORKER_DIGEST


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "admission.toml"
    path.write_text(CONFIG)
    listen, settings = load_config(path)
    assert (listen.host, listen.port, listen.reload_seconds, listen.grace_seconds) == ("127.0.0.1", 0, 1, 10)
    assert listen.certificate == tmp_path / "tls.crt"
    assert settings.runtime_classes == ("kata-qemu-snp", "kata-qemu-tdx")
    assert settings.other_digests is None
    assert WORKER_DIGEST in settings.worker.digests
    assert settings.worker.limits["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('listen = "127.0.0.1:0"', 'listen = "here"', "listen"),
        ('listen = "127.0.0.1:0"', 'listen = "127.0.0.1:70000"', "listen"),
        ('listen = "127.0.0.1:0"', "", "listen"),
        ("reload_seconds = 1", "reload_seconds = 0", "reload_seconds"),
        ("reload_seconds = 1", "reload_second = 1", "reload_second"),
        ('["kata-qemu-snp", "kata-qemu-tdx"]', "[]", "runtime_classes"),
        ('["kata-qemu-snp", "kata-qemu-tdx"]', '["Kata"]', "runtime_classes"),
        ('other_images = "pinned"', "", "other_images"),
        ('other_images = "pinned"', 'other_images = "any"', "other_images"),
        ('other_images = "pinned"', 'other_images = ["latest"]', "other_images"),
        ('other_images = "pinned"', 'other_images = "pinned"\nkey_names = ["("]', "key_names"),
        ('other_images = "pinned"', 'other_images = "pinned"\nrequire = false', "require"),
        (f"worker@{WORKER_DIGEST}", "worker:1", "worker.image"),
        (f"worker@{WORKER_DIGEST}", f"worker@sha256:{'99' * 32}", "worker.image"),
        (f'digests = ["{WORKER_DIGEST}"', 'digests = ["sha256:00"', "worker.digests"),
        ('memory = "4Gi"\nrun', 'memory = "4096Mi"\nrun', "worker.memory"),
        ('memory = "4Gi"\nrun', 'memory = "lots"\nrun', "worker.memory"),
        ("run_as_user = 65532", "run_as_user = -1", "run_as_user"),
        ('config_map = "keyquorum-worker"', 'config_map = "../x"', "worker.config_map"),
        ('cpu = "8"', 'cpu = "eight"', "worker.limits.cpu"),
        ('cpu = "8"', "cpu = 8", "cpu"),
        ('"amd.feature.node.kubernetes.io/snp" = "true"', '"a b" = "true"', "node_selector"),
    ],
)
def test_a_bad_member_is_named(old: str, new: str, named: str) -> None:
    assert old in CONFIG
    with pytest.raises(MalformedError) as caught:
        parse_config(CONFIG.replace(old, new, 1).encode(), Path("/"))
    assert named in str(caught.value)
    assert caught.value.expected


def test_the_documented_file_is_one_that_is_read() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "kubernetes.md").read_text()
    example = text.partition("## admission.toml")[2].partition("```toml\n")[2].partition("```")[0]
    assert "[worker]" in example
    digest = iter(["00" * 32, "00" * 32, "11" * 32])
    while "sha256:…" in example:
        example = example.replace("sha256:…", f"sha256:{next(digest)}", 1)
    plain, every = example, re.sub(r"^# (?=[a-z_]+ = |\[)", "", example, flags=re.MULTILINE)
    assert every != plain
    for each in (plain, every):
        assert len(parse_config(each.encode(), Path("/"))[1].worker.digests) == 2


def test_a_node_selector_must_select() -> None:
    text = CONFIG
    for line in CONFIG.splitlines():
        if line.endswith('= "true"'):
            text = text.replace(line + "\n", "")
    with pytest.raises(MalformedError, match="node_selector"):
        parse_config(text.encode(), Path("/"))


def test_a_file_that_is_not_there_not_toml_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "admission.toml"
    for data, reason in ((None, Reason.NOT_FOUND), (b"\xff", Reason.MALFORMED), (b"a = ", Reason.MALFORMED),
                         (b"#" * (300 << 10), Reason.TOO_LARGE)):  # fmt: skip
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(KeyquorumError) as caught:
            load_config(path)
        assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("SESSION_KEY", True),
        ("session_key", True),
        ("APP_ENCRYPTION_KEY_B64", True),
        ("DATAKEY", True),
        ("KEY", True),
        ("KEYQUORUM_KEY", True),
        ("DB_PASSWORD", True),
        ("KEYBOARD", False),
        ("MONKEY", False),
        ("PUBLIC_KEY", False),
        ("LEVEL", False),
        ("A" * 1025, True),
    ],
)
def test_which_names_say_key(name: str, key: bool) -> None:
    assert parse_config(CONFIG.encode(), Path("/"))[1].names_a_key(name) is key
