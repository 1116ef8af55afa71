"""Measurements computed from images: known answers of other people's tools, and every way an image can be no image.

The digests under ``KNOWN`` were computed by sev-snp-measure 0.0.13 (IBM) from the very images that
``tests/support/firmware.py`` makes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum.cli import run
from keyquorum_core.attestation.firmware_image import parse_firmware
from keyquorum_core.attestation.pe_image import authenticode_sha384
from keyquorum_core.attestation.snp_measure import CPU_MODELS, DirectBoot, cpu_signature, snp_measurement
from keyquorum_core.attestation.tdx_measure import direct_boot_rtmrs, tdx_mrtd
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support.firmware import CODE, SEV_SECTIONS, TDVF_SECTIONS, firmware, pe_image

BOOT = DirectBoot(b"a kernel", b"an initrd", "console=ttyS0")
GUESTS: dict[str, tuple[int, str, DirectBoot | None, int]] = {
    "one": (1, "EPYC-Milan", None, 1),
    "four": (4, "EPYC-Genoa", None, 0x21),
    "boot": (2, "EPYC-Turin", BOOT, 1),
    "bare": (1, "EPYC", DirectBoot(b"a kernel"), 1),
}
KNOWN = {
    "qemu": {
        "one": "05c255176cbf15fad6d846ccb2797c3c67da3f916162043abed855d2950a59029789d7cd6f197c366623e7e5f936872c",
        "four": "ccba04edb09fdd7cd488e566c34cb7b5aa3ff9eca5752ecb577bbb8746f553b3d46197d75441e80f45cd559d510cf89b",
        "boot": "95fb647347c9434801469a91fd4b9d1ca4dc5fa65e4d702f930a2bb17d8795db7b55ddaf7b19b4caf252d716b7cdbf4f",
        "bare": "f42eb8e2677986d645605810c41fb9ed6234dedccfbe56e46a7226c28d76cc22ba5bef8c6a478caacdba1b028ad40c45",
    },
    "ec2": {
        "one": "c0e846d789b198b55432badb183f19abc704ee89c3775a1b2a39e3061056e7130dcadb11902675c7a02ebcb068b3d349",
        "four": "25437c044770f846568ad72e8d5c143d6f9984977143f62d421f04a92fd562b4c145b2df2f7c6cc0261009e224bc6132",
        "boot": "f9c09d98c7c63d400746f4e8fbb1b7094bc54f5ec64fed40d9529eaee84a7eeac74ed70c576c9aa16727ed3d12948c29",
        "bare": "39b3bf868fb83505a72b018a0fd250f7ceab9d2bc5aa801475f973bacbfb51e34c290ab9039b55e377fb155a878ad058",
    },
    "gce": {
        "one": "c4ca25038b0768e4d8e08b28dc56fa27d7491235b743a48ba436642c482d66d7c6fc833621d983d953c79d8442119389",
        "four": "597b4ea5f5994829741627e3b6a3277c3ace252a051ca31dfa7d9b05a6c4c2cbaec6b2ea1d1437384cc3f9b948a1a336",
        "boot": "1219afebfb1fd6c7d55c992681f59adb11464edb437427013391984825a2464c1a061bc10d34e9cdac5150e5840fb9b7",
        "bare": "78283dcc3b2fedc596e563d86704802d1b912700dadf5866c0ff0dd0af35f1b9d89632b79f616b5871dfec9097f79e3f",
    },
}


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def measured(guest: str, hypervisor: str = "qemu", image: bytes | None = None) -> str:
    cpus, model, boot, features = GUESTS[guest]
    return snp_measurement(
        firmware() if image is None else image,
        cpus=cpus,
        signature=cpu_signature(*CPU_MODELS[model]),
        guest_features=features,
        hypervisor=hypervisor,
        boot=boot,
    ).hex()


# SEV-SNP


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("hypervisor", KNOWN)
def test_the_launch_measurement_is_that_of_another_tool(hypervisor: str, guest: str) -> None:
    assert measured(guest, hypervisor) == KNOWN[hypervisor][guest]


def test_everything_that_is_launched_changes_the_measurement() -> None:
    base = measured("boot")
    assert measured("boot", image=firmware(patch={0: b"\xff"})) != base
    moved = (*SEV_SECTIONS[:-1], (0x812000, 0xF000, 1))
    assert measured("boot", image=firmware(sev=moved)) != base
    assert measured("boot", image=firmware(sev=SEV_SECTIONS[::-1])) != base
    signature = cpu_signature(*CPU_MODELS["EPYC-Turin"])
    for boot in (None, DirectBoot(b"", b"an initrd", "console=ttyS0"), DirectBoot(b"a kernel", b"", "console=ttyS0"),
                 DirectBoot(b"a kernel", b"an initrd", "console=ttyS0 ")):  # fmt: skip
        assert snp_measurement(firmware(), cpus=2, signature=signature, boot=boot).hex() != base
    for other in ({"cpus": 3}, {"signature": signature + 1}, {"guest_features": 3}, {"hypervisor": "gce"}):
        guest = {"cpus": 2, "signature": signature, "boot": BOOT} | other
        assert snp_measurement(firmware(), **guest).hex() != base  # type: ignore[arg-type]


def test_cpu_signatures_are_those_of_cpuid() -> None:
    assert cpu_signature(0x19, 1, 1) == 0x00A00F11
    assert cpu_signature(0x19, 17, 0) == 0x00A10F10
    assert cpu_signature(6, 0x8F, 8) == 0x000806F8
    refused(Reason.MALFORMED, lambda: cpu_signature(-1, 0, 0))


def test_a_firmware_that_does_not_measure_the_kernel_is_refused() -> None:
    without = firmware(sev=[each for each in SEV_SECTIONS if each[2] != 0x10])
    refused(Reason.UNSUPPORTED, lambda: measured("boot", image=without))
    assert measured("one", image=without) != measured("one")


def test_guests_that_do_not_exist_are_refused() -> None:
    for cpus, hypervisor in ((0, "qemu"), (5000, "qemu"), (1, "hyperv")):
        refused(
            Reason.MALFORMED,
            lambda c=cpus, h=hypervisor: snp_measurement(firmware(), cpus=c, signature=0, hypervisor=h),  # type: ignore[misc]
        )


# TDX


def stream(image: bytes, sections: Sequence[tuple[int, int, int, int, int, int]]) -> bytes:
    """All that the TDX module hashes, written out as the specification says it."""
    out = b""
    for offset, size, address, memory, _, attributes in sections:
        contents = image[offset : offset + size].ljust(memory, b"\0")
        for page in range(0, memory, 4096) if not attributes & 2 else ():
            out += b"MEM.PAGE.ADD\0\0\0\0" + struct.pack("<Q", address + page) + bytes(104)
            for at in range(page, page + 4096, 256) if attributes & 1 else ():
                out += b"MR.EXTEND".ljust(16, b"\0") + struct.pack("<Q", address + at) + bytes(104)
                out += contents[at : at + 256]
    return out


def test_mrtd_is_the_hash_of_what_the_hypervisor_does() -> None:
    """The first value is that of an independent program, too."""
    assert tdx_mrtd(firmware()).hex().startswith("4bce86c977961a7b1ee1591471fe2255c0748f732aac608e")
    partly = [(0x2000, 0x1800, 0xFFC02000, 0x2000, 0, 1)]
    for sections in (TDVF_SECTIONS, TDVF_SECTIONS[:4], TDVF_SECTIONS[:1], TDVF_SECTIONS[::-1], partly):
        image = firmware(tdvf=sections)
        assert tdx_mrtd(image) == hashlib.sha384(stream(image, sections)).digest()
    assert tdx_mrtd(firmware(), two_passes=True).hex().startswith("ff848df2bcb5e364c5556cbbebfd2803")


def test_mrtd_depends_on_measured_contents_alone_and_needs_some() -> None:
    base = tdx_mrtd(firmware())
    assert tdx_mrtd(firmware(patch={0x2000: b"\xff"})) != base
    assert tdx_mrtd(firmware(patch={0x0: b"\xff"})) == base, "the variable store's contents are not measured"
    refused(Reason.MALFORMED, lambda: tdx_mrtd(firmware(tdvf=TDVF_SECTIONS[1:])))


def test_authenticode_leaves_out_checksum_and_certificates_and_nothing_else() -> None:
    image = pe_image()
    optional = 0x98
    holes = [(optional + 64, optional + 68), (optional + 144, optional + 152)]
    rest = b"".join(image[a:b] for a, b in ((0, holes[0][0]), (holes[0][1], holes[1][0]), (holes[1][1], len(image))))
    assert authenticode_sha384(image) == hashlib.sha384(rest).digest()
    assert authenticode_sha384(pe_image(b"certificates" * 8)) == authenticode_sha384(image)
    assert authenticode_sha384(pe_image(plus=False)) != authenticode_sha384(image)
    assert authenticode_sha384(pe_image(plus=False)) == authenticode_sha384(pe_image(b"c" * 8, plus=False))
    for at in (0x400, 0x800, 0x200, len(image) - 1):
        changed = bytearray(image)
        changed[at] ^= 1
        assert authenticode_sha384(bytes(changed)) != authenticode_sha384(image)


def test_registers_of_a_direct_boot() -> None:
    rtmr1, rtmr2 = direct_boot_rtmrs(pe_image(), b"an initrd", "console=ttyS0")
    options = hashlib.sha384("initrd=initrd console=ttyS0\0".encode("utf-16-le")).digest()
    first = hashlib.sha384(bytes(48) + options).digest()
    assert rtmr2 == hashlib.sha384(first + hashlib.sha384(b"an initrd").digest()).digest()
    assert direct_boot_rtmrs(pe_image(trailing=b"other"), b"an initrd", "console=ttyS0")[0] != rtmr1
    assert direct_boot_rtmrs(pe_image(), b"another", "console=ttyS0") != (rtmr1, rtmr2)
    refused(Reason.MALFORMED, lambda: direct_boot_rtmrs(b"no kernel", b"", ""))


# What is no image


@pytest.mark.parametrize(
    "image",
    [
        b"",
        bytes(4095),
        bytes(4096),
        CODE,
        firmware()[4096:] + bytes(4096),
        firmware()[:-1],
        firmware(entries={}),
        firmware(entries={"dc886566-984a-4798-a75e-5585a7bf67cc": b"\xff\xff\xff\xff"}),
        firmware(entries={"dc886566-984a-4798-a75e-5585a7bf67cc": b"\x01"}),
        firmware(sev=[(0x800001, 0x1000, 1)]),
        firmware(sev=[(0x800000, 0, 1)]),
        firmware(sev=[(0x800000, 0x1000, 9)]),
        firmware(sev=[(0x810000, 0x2000, 0x10)]),
    ],
    ids=range(13),
)
def test_what_is_no_firmware_for_sev_snp_is_refused(image: bytes) -> None:
    with pytest.raises(MalformedError):
        measured("boot", image=image)


@pytest.mark.parametrize(
    "sections",
    [
        [(0, 0x2000, 0x1000, 0x1000, 0, 1)],
        [(0xFFFF0, 0x1000, 0x1000, 0x1000, 0, 1)],
        [(0, 0x1000, 0x1001, 0x1000, 0, 1)],
        [(0, 0x1000, 0x1000, 1 << 40, 0, 1)],
        [],
    ],
)
def test_what_is_no_tdvf_is_refused(sections: list[tuple[int, int, int, int, int, int]]) -> None:
    with pytest.raises(MalformedError):
        tdx_mrtd(firmware(tdvf=sections))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_bytes_make_the_readers_raise_anything_else(data: st.DataObject) -> None:
    original = data.draw(st.sampled_from([firmware(), pe_image(b"c" * 16)]))
    raw = bytearray(original)
    end = len(raw)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, 0x300) | st.integers(end - 0x900, end - 1))
        raw[at] = data.draw(st.integers(0, 255))
    for read in (parse_firmware, tdx_mrtd, authenticode_sha384):
        try:
            read(bytes(raw))
        except MalformedError:
            continue


# The command


def test_the_command_prints_what_reference_values_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"fw": firmware(), "kernel": b"a kernel", "initrd": b"an initrd", "pe": pe_image()}
    paths = {name: str(tmp_path / name) for name in files}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    boot = ["--kernel", paths["kernel"], "--initrd", paths["initrd"], "--cmdline", "console=ttyS0"]
    snp = ["attest", "measure", "snp", "--ovmf", paths["fw"], "--vcpus", "2"]
    for cpu in ("EPYC-Turin", "EPYC-Turin-v1", "26.0.0"):
        assert run([*snp, "--cpu", cpu, *boot, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"measurement": KNOWN["qemu"]["boot"]}
    assert run([*snp, "--cpu", "EPYC-Turin", *boot]) == 0
    assert KNOWN["qemu"]["boot"] in capsys.readouterr().out
    tdx = ["attest", "measure", "tdx", "--tdvf", paths["fw"]]
    assert run([*tdx, "--kernel", paths["pe"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found) == ["mrtd", "rtmr1", "rtmr2", "rtmr3"]
    assert (found["mrtd"], found["rtmr3"]) == (tdx_mrtd(firmware()).hex(), "00" * 48)
    for wrong in ([*snp, "--cpu", "Pentium"], [*snp, "--cmdline", "x"], [*tdx, "--cmdline", "x"],
                  [*tdx, "--kernel", paths["pe"], "--event-log", paths["fw"]]):  # fmt: skip
        assert run(wrong) == 2
    assert run([*tdx, "--event-log", paths["fw"], "--json"]) == 1
    capsys.readouterr()
    for command in ("snp", "tdx"):
        assert run(["attest", "measure", command, "--help"]) == 0
        assert "Not covered" in capsys.readouterr().out
