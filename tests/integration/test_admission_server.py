"""The webhook as a process, over HTTPS: reviews as an API server sends them, bad ones, new certificates, its end."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from keyquorum_admission.cli import app
from tests.support.admission import CONFIG, apply_patch, pod, review

VECTORS = Path(__file__).parent / "vectors" / "admission"


def certificate(serial: int) -> tuple[bytes, bytes]:
    """A self-signed certificate of 127.0.0.1 and its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admission")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made.public_bytes(encoding), private


class Webhook:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = (folder / "log").open("w+")
        (folder / "admission.toml").write_text(CONFIG)
        self.write(1)
        config = str(folder / "admission.toml")
        command = [sys.executable, "-m", "keyquorum_admission", "serve", "--config", config, "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        self.url = json.loads(line)["url"]
        self.client = self.trusting()

    def write(self, serial: int) -> None:
        certificate_pem, key_pem = certificate(serial)
        self.replace("tls.key", key_pem)
        self.replace("tls.crt", certificate_pem)

    def replace(self, name: str, data: bytes) -> None:
        (self.folder / f"{name}.new").write_bytes(data)
        (self.folder / f"{name}.new").replace(self.folder / name)

    def trusting(self) -> httpx.Client:
        """A client that believes the certificate at hand and no other."""
        context = ssl.create_default_context(cafile=str(self.folder / "tls.crt"))
        return httpx.Client(base_url=self.url, verify=context, trust_env=False)

    def serial(self) -> int:
        """Of the certificate that a new connection is shown."""
        host, port = self.url.removeprefix("https://").split(":")
        pem = ssl.get_server_certificate((host, int(port)), timeout=10)
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    def said(self) -> str:
        self.log.flush()
        return (self.folder / "log").read_text()

    def until(self, what: str) -> None:
        for _ in range(600):
            if what in self.said():
                return
            time.sleep(0.05)
        raise AssertionError(f"{what!r} is not in {self.said()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
        return code


@pytest.fixture(scope="module")
def webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    running = Webhook(tmp_path_factory.mktemp("admission"))
    yield running
    assert running.stop() == 0
    assert "Traceback" not in (running.folder / "log").read_text()


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_a_review_as_an_api_server_sends_it(path: Path, webhook: Webhook) -> None:
    vector = json.loads(path.read_text())
    asked, expect = vector["review"], vector["expect"]
    answer = webhook.client.post(vector["path"], params={"timeout": "10s"}, json=asked)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert (document["apiVersion"], document["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response = document["response"]
    assert response["uid"] == asked["request"]["uid"]
    assert response["allowed"] is expect["allowed"]
    causes = response.get("status", {}).get("details", {}).get("causes", [])
    assert sorted({cause["reason"] for cause in causes}) == expect["rules"]
    assert ("patch" in response) is expect["patched"]
    if expect["patched"]:
        again = {**asked, "request": {**asked["request"], "object": patched(asked["request"]["object"], response)}}
        second = webhook.client.post(vector["path"], json=again).json()["response"]
        assert second["allowed"]
        assert "patch" not in second
        verdict = webhook.client.post(vector["path"].replace("mutate", "validate"), json=again).json()["response"]
        assert verdict == {"uid": response["uid"], "allowed": True}


def patched(of: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    assert response["patchType"] == "JSONPatch"
    return apply_patch(of, json.loads(base64.b64decode(response["patch"])))


def test_there_are_vectors_of_every_kind_and_operation() -> None:
    seen = {
        (found["kind"]["kind"], found["operation"])
        for found in (json.loads(path.read_text())["review"]["request"] for path in VECTORS.glob("*.json"))
    }
    kinds = ["Pod", "ReplicationController", "Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job", "CronJob"]
    assert seen >= {(kind, operation) for kind in kinds for operation in ("CREATE", "UPDATE", "DELETE")}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "MALFORMED"),
        (b"\xff\xfe", 400, "MALFORMED"),
        (b"null", 400, "MALFORMED"),
        (b"[1]", 400, "MALFORMED"),
        (b'{"request":{"uid":""}}', 400, "MALFORMED"),
        (b"[" * 100_000, 400, "MALFORMED"),
        (b'{"a":1,"a":2}', 400, "MALFORMED"),
        (b" " * ((8 << 20) + 1), 413, "TOO_LARGE"),
        (b'{"request":{"uid":"u-1"}}', 200, "MALFORMED"),
    ],
    ids=["empty", "binary", "null", "list", "no-uid", "deep", "twice", "large", "uid-alone"],
)
def test_what_is_no_review_is_denied_and_never_an_error_of_ours(
    webhook: Webhook, body: bytes, status: int, reason: str
) -> None:
    answer = webhook.client.post("/v1/validate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    response = answer.json()["response"]
    assert response["allowed"] is False
    assert response["status"]["reason"] == reason
    assert response["uid"] == ("u-1" if status == 200 else "")


def test_another_type_of_body_path_or_method(webhook: Webhook) -> None:
    answer = webhook.client.post("/v1/validate", content=b"{}", headers={"Content-Type": "text/yaml"})
    assert answer.status_code == 400
    assert answer.json()["response"]["status"]["reason"] == "UNSUPPORTED"
    assert webhook.client.post("/v1/nothing", json={}).status_code == 404
    assert webhook.client.get("/v1/validate").status_code == 405


def test_health_and_metrics(webhook: Webhook) -> None:
    assert webhook.client.get("/healthz").text == "ok\n"
    webhook.client.post("/v1/validate", json=review(pod()))
    text = webhook.client.get("/metrics").text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(counts['keyquorum_admission_reviews_total{outcome="refused",seat="validate"}']) >= 1
    assert float(counts['keyquorum_admission_findings_total{rule="WORKER"}']) >= 3
    assert float(counts["keyquorum_admission_seconds_count"]) >= 1
    assert float(counts["keyquorum_admission_certificate_expires"]) > time.time()
    assert float(counts["keyquorum_admission_unforeseen_total"]) == 0
    assert "h2-vqe" not in text


def test_a_refusal_is_logged_with_its_rules_and_no_values(webhook: Webhook) -> None:
    asked = pod()
    asked["spec"]["containers"][0]["env"] = [{"name": "SESSION_KEY", "value": "c2VjcmV0IHZhbHVl"}]
    webhook.client.post("/v1/validate", json=review(asked, uid="logged-1"))
    webhook.until("logged-1")
    line = next(json.loads(each) for each in webhook.said().splitlines() if "logged-1" in each)
    assert (line["event"], line["kind"], line["name"]) == ("review.refused", "Pod", "h2-vqe")
    assert "SECRET" in line["rules"]
    assert "c2VjcmV0" not in webhook.said()


def test_many_at_once_get_each_its_own_answer(webhook: Webhook) -> None:
    def ask(number: int) -> str:
        found: str = webhook.client.post("/v1/mutate", json=review(pod(), uid=f"n-{number}")).json()["response"]["uid"]
        return found

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(100))) == [f"n-{number}" for number in range(100)]


def test_old_tls_is_refused(webhook: Webhook) -> None:
    context = ssl.create_default_context(cafile=str(webhook.folder / "tls.crt"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        httpx.Client(base_url=webhook.url, verify=context, trust_env=False) as client,
        pytest.raises(httpx.ConnectError),
    ):
        client.get("/healthz")


def test_a_new_certificate_is_taken_up_and_a_broken_one_is_not(tmp_path: Path) -> None:
    webhook = Webhook(tmp_path)
    try:
        assert webhook.serial() == 1
        webhook.replace("tls.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        webhook.until("certificate.refused")
        assert webhook.serial() == 1
        webhook.replace("tls.crt", certificate(2)[0])  # of another key than the one beside it
        webhook.until("cannot be used")
        assert webhook.serial() == 1
        assert webhook.client.get("/metrics").text.count("keyquorum_admission_certificate_refused 1.0") == 1
        webhook.write(3)
        webhook.until("certificate.reloaded")
        assert webhook.serial() == 3
        with webhook.trusting() as client:
            assert client.post("/v1/validate", json=review(pod())).json()["response"]["allowed"] is False
            assert "keyquorum_admission_certificate_refused 0.0" in client.get("/metrics").text
    finally:
        code = webhook.stop(signal.SIGINT)
    assert code == 0
    assert "admission.ended" in (tmp_path / "log").read_text()


def test_what_is_being_answered_is_finished_before_the_end(tmp_path: Path) -> None:
    webhook = Webhook(tmp_path)
    body = json.dumps(review(pod(), uid="last")).encode()

    def slowly() -> Iterator[bytes]:
        yield body[:10]
        webhook.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        yield body[10:]

    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    answer = webhook.client.post("/v1/validate", content=slowly(), headers=headers)
    assert answer.json()["response"]["uid"] == "last"
    assert webhook.process.wait(30) == 0
    webhook.stop()


def test_it_does_not_start_with_what_it_cannot_use(tmp_path: Path) -> None:
    def started() -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, ["serve", "--json", "--config", str(tmp_path / "a.toml")])
        error: dict[str, Any] = json.loads(done.stdout)["error"]
        return done.exit_code, error

    code, error = started()
    assert (code, error["reason"]) == (1, "NOT_FOUND")
    (tmp_path / "a.toml").write_text(CONFIG)
    code, error = started()
    assert (code, error["reason"]) == (1, "NOT_FOUND")
    assert "TLS certificate" in error["message"]
    pem, _ = certificate(1)
    (tmp_path / "tls.crt").write_bytes(pem)
    (tmp_path / "tls.key").write_bytes(certificate(2)[1])
    code, error = started()
    assert (code, error["reason"]) == (1, "MALFORMED")
