"""Verification of evidence beside the native tools, in one run: how much the checks around the cryptography cost.

The floor of each type is what must be computed whoever does it: ``dcap-qvl`` itself for TDX; for the others the raw
signature verifications of OpenSSL's libcrypto, on the same keys, messages and signatures, called one after another (for
SEV-SNP also as the rates that the ``openssl`` command measures, for TPM quotes also ``tpm2_checkquote``, where found).
*First sight* verifies the whole chain of hardware that is new; for SEV-SNP AMD's intermediate and root, which come with
every chip of their product, have been parsed before, and *first of its product* is without that. *Seen before* is
hardware whose certificates this process has verified already, as most are in production: the floor is the one signature
over the evidence. Rounds of floor and product alternate; each figure is the median round.

*Kept* is what a custodian does when evidence comes again that it accepted before.

    python -m benchmarks attestation
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import dcap_qvl  # type: ignore[import-untyped]
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from keyquorum_core.attestation import nitro, nvidia_certificates, nvidia_gpu, sev_snp, snp_certificates, tdx, tpm2
from keyquorum_core.attestation.nitro_document import parse_document
from keyquorum_core.attestation.nvidia_report import parse_report as parse_gpu_report
from keyquorum_core.attestation.snp_report import SIGNED_BYTES
from keyquorum_core.attestation.tdx_collateral import parse_collateral
from keyquorum_core.attestation.tpm2_structures import parse_signature
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.appraisals import Appraisals
from keyquorum_custodian.tpms import Tpms
from tests.support import intel_vendor, nitro_vendor, nvidia, soft_tpm, vendor
from tests.support.custodian import build_committee
from tests.support.swtpm import Manufacturer

__all__ = ["measure"]

ROUNDS = 15
ROUND_SECONDS = 0.05
TARGET_RATIO = 1.5
CACHED_TARGET_MICROSECONDS = 50
_PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)

Call = Callable[[], object]


def _seconds(call: Call, before: Call | None) -> float:
    """Of one call, over a short round, in CPU time, which others on the machine disturb less; ``before`` each call runs
    outside the clock."""
    total, count, stop = 0.0, 0, time.perf_counter() + ROUND_SECONDS
    while time.perf_counter() < stop or not count:
        if before is not None:
            before()
        started = time.process_time()
        call()
        total += time.process_time() - started
        count += 1
    return total / count


def _compare(product: Call, floor: Call, *, before: Call | None = None) -> dict[str, object]:
    """Medians of alternating rounds, in microseconds, and their ratio."""
    product(), floor()
    pairs = [(_seconds(product, before), _seconds(floor, None)) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(each) * 1e6 for each in zip(*pairs, strict=True))
    return {
        "verify_us": round(ours, 1),
        "native_us": round(theirs, 1),
        "ratio": round(ours / theirs, 2),
        "target": f"at most {TARGET_RATIO}",
    }


def _all(calls: list[Call]) -> None:
    for call in calls:
        call()


def _issued(certificate: bytes, issuer: bytes, scheme: object) -> Call:
    """The raw check of a certificate's signature: no name, date or extension is looked at."""
    parsed, above = x509.load_der_x509_certificate(certificate), x509.load_der_x509_certificate(issuer)
    key, algorithm = above.public_key(), parsed.signature_hash_algorithm
    signed, signature = parsed.tbs_certificate_bytes, parsed.signature
    assert algorithm is not None
    if isinstance(key, rsa.RSAPublicKey):
        assert isinstance(scheme, padding.PSS)
        return partial(key.verify, signature, signed, scheme, algorithm)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return partial(key.verify, signature, signed, ec.ECDSA(algorithm))


def _chain(ders: list[bytes], scheme: object = None) -> list[Call]:
    """Leaf first; the last one issued itself."""
    return [_issued(each, above, scheme) for each, above in zip(ders, [*ders[1:], ders[-1]], strict=True)]


def _ecdsa(key: object, r: int, s: int, message: bytes, algorithm: hashes.HashAlgorithm) -> Call:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return partial(key.verify, encode_dss_signature(r, s), message, ec.ECDSA(algorithm))


def _sev_snp() -> dict[str, object]:
    chip, root = vendor.development_chip(), vendor.development_vendor().root
    report = chip.sign_report(bytes(64), vendor.MEASUREMENT)
    r, s = (int.from_bytes(report[at : at + 72], "little") for at in (SIGNED_BYTES, SIGNED_BYTES + 72))
    own = _ecdsa(chip.key.public_key(), r, s, report[:SIGNED_BYTES], hashes.SHA384())
    product = partial(sev_snp.verify, report, chip.endorsements, pinned_roots=[root], now=vendor.CREATED_AT + 1000)

    def forget() -> None:
        snp_certificates._verify.cache_clear()
        snp_certificates._facts.cache_clear()

    def forget_chip() -> None:
        forget()
        for authority in chip.endorsements[1:]:
            snp_certificates._facts(authority)

    floor = partial(_all, [own, *_chain(list(chip.endorsements), _PSS)])
    return {
        "first_of_its_product": _compare(product, floor, before=forget),
        "first_sight": _compare(product, floor, before=forget_chip),
        "seen_before": _compare(product, own),
        "openssl_speed": _openssl_speed(),
    }


def _tdx() -> dict[str, object]:
    made = intel_vendor.intel_vendor()
    quote, collateral = made.quote(), intel_vendor.good_collateral()
    now = intel_vendor.NOW
    native = parse_collateral(collateral).native
    root = made.root.public_bytes(Encoding.DER)
    floor = partial(dcap_qvl.verify_with_root_ca, quote, native, root, now)
    return _compare(partial(tdx.verify, quote, collateral, pinned_roots={made.fingerprint}, now=now), floor)


def _tpm2() -> dict[str, object]:
    found: dict[str, object] = {}
    for kind in ("rsa", "p256"):
        key = soft_tpm.soft_key(kind)
        evidence = soft_tpm.evidence(key)
        signature, public = parse_signature(evidence.signature), key.private.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            floor: Call = partial(
                public.verify,
                key.sign(evidence.quote, form="plain"),
                evidence.quote,
                padding.PKCS1v15(),
                hashes.SHA256(),
            )
        else:
            r, s = (int.from_bytes(each, "big") for each in signature.parts)
            floor = _ecdsa(public, r, s, evidence.quote, hashes.SHA256())
        found[kind] = _compare(partial(tpm2.verify, evidence.to_bytes()), floor)
    return found | {"tpm2_checkquote": _checkquote()}


def _checkquote() -> dict[str, object]:
    """The native tool, which checks signature, nonce and PCRs as we do, on a quote by a real TPM in software. It is a
    process: what it takes to start, say its version and end is taken off."""
    program = shutil.which("tpm2_checkquote")
    if program is None or shutil.which("swtpm_setup") is None:
        return {"skipped": "no tpm2-tools, or no swtpm"}
    with tempfile.TemporaryDirectory(prefix="keyquorum-bench-tpm-") as scratch:
        tpm = Manufacturer(Path(scratch)).make("tpm")
        try:
            ak, nonce, pcrs = tpm.create_ak(), bytes(range(32)), (0, 4, 7)
            quote, signature = tpm.quote(ak, nonce, pcrs)
            evidence = tpm2.Tpm2Evidence(ak.pem, quote, signature, "sha256", tpm.pcrs(pcrs)).to_bytes()
            tpm.tool(
                *("tpm2_quote", "-c", ak.handle, "-l", "sha256:0,4,7", "-q", nonce.hex(), "-m", "quote"),
                *("-s", "signature", "-o", "pcrs", "--scheme", ak.scheme, "-g", ak.hash_name),
            )
        finally:
            tpm.stop()
        (tpm.folder / "ak.pem").write_text(ak.pem)
        check = [
            program,
            "-u",
            "ak.pem",
            "-m",
            "quote",
            "-s",
            "signature",
            "-f",
            "pcrs",
            "-g",
            "sha256",
            "-q",
            nonce.hex(),
        ]

        def run(command: list[str]) -> float:
            started = time.perf_counter()
            subprocess.run(command, cwd=tpm.folder, check=True, capture_output=True)
            return time.perf_counter() - started

        pairs = [(run(check), run([program, "--version"])) for _ in range(2 * ROUNDS)]
    whole, start_up = (statistics.median(each) * 1e6 for each in zip(*pairs, strict=True))
    ours = statistics.median(_seconds(partial(tpm2.verify, evidence), None) for _ in range(ROUNDS)) * 1e6
    return {
        "verify_us": round(ours, 1),
        "process_us": round(whole),
        "start_up_us": round(start_up),
        "native_us": round(whole - start_up),
        "ratio": round(ours / max(whole - start_up, 1e-3), 2),
        "target": f"at most {TARGET_RATIO}",
    }


def _forget_gpus() -> None:
    nvidia_certificates._verify_device.cache_clear()
    nvidia_certificates._verify_chain.cache_clear()


def _nvidia() -> dict[str, object]:
    gpu = nvidia.gpu()
    report = gpu.report()
    parsed = parse_gpu_report(report)
    own = _ecdsa(gpu.chain.links[0].key.public_key(), *parsed.signature, parsed.signed, hashes.SHA384())
    product = partial(
        nvidia_gpu.verify, report, gpu.chain.ders, pinned_roots=[gpu.chain.root], now=nvidia.CREATED_AT + 1000
    )
    floor = partial(_all, [own, *_chain(list(gpu.chain.ders))])
    return {
        "first_sight": _compare(product, floor, before=_forget_gpus),
        "seen_before": _compare(product, own),
    }


def _nitro() -> dict[str, object]:
    made = nitro_vendor.nitro_vendor()
    document = made.document()
    parsed = parse_document(document)
    r, s = (int.from_bytes(each, "big") for each in (parsed.signature[:48], parsed.signature[48:]))
    own = _ecdsa(made.chain[-1].key.public_key(), r, s, parsed.to_be_signed(), hashes.SHA384())
    product = partial(nitro.verify, document, pinned_roots=[made.fingerprint], now=nitro_vendor.NOW + 60)
    floor = partial(_all, [own, *_chain([parsed.certificate, *reversed(parsed.cabundle)])])
    return {
        "first_sight": _compare(product, floor, before=nitro._verify_chain.cache_clear),
        "seen_before": _compare(product, own),
    }


def _openssl_speed() -> Mapping[str, object]:
    """What the ``openssl`` command's own rates of verification say that a report with its chain takes."""
    program = shutil.which("openssl")
    if program is None:
        return {"skipped": "no openssl command"}
    command = [program, "speed", "-seconds", "1", "-mr", "ecdsap384", "rsa4096"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    rates = {line.split(":")[0]: line.split(":") for line in done.stdout.splitlines() if line.startswith("+F")}
    if done.returncode or not {"+F2", "+F4"} <= rates.keys():
        return {"skipped": "its output is of another form"}
    each = {"ecdsap384_per_s": float(rates["+F4"][4]), "rsa4096_per_s": float(rates["+F2"][4])}
    floor = 1e6 / each["ecdsap384_per_s"] + 3e6 / each["rsa4096_per_s"]
    return {name: round(value) for name, value in each.items()} | {"report_and_chain_us": round(floor, 1)}


def _kept() -> dict[str, object]:
    """A custodian's own object, with its keystore behind it."""
    with tempfile.TemporaryDirectory(prefix="keyquorum-bench-custodian-") as scratch:
        committee = build_committee(Path(scratch))
        try:
            node = committee.open("ch-1")
            document = committee.evidence(RecipientKey.generate(), Identity.generate())
            digest, now = hashlib.sha256(document).digest(), int(time.time())
            appraisals = Appraisals(node.bulletins, "ch-1", node.windows, node.keystore, Tpms(node.keystore))
            ask = partial(appraisals.appraise, document, digest, ("sev-snp",), now)
            ask()
            kept = statistics.median(_seconds(ask, None) for _ in range(ROUNDS)) * 1e6
        finally:
            committee.close()
    return {
        "kept_us": round(kept, 2),
        "target": f"under {CACHED_TARGET_MICROSECONDS}",
    }


def measure() -> dict[str, object]:
    return {
        "sev-snp": _sev_snp(),
        "tdx": _tdx(),
        "tpm2": _tpm2(),
        "nvidia-gpu": _nvidia(),
        "nitro": _nitro(),
        "kept_appraisal": _kept(),
    }
