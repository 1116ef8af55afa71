"""The HTTP side: bytes to :func:`~keyquorum_admission.review.answer` and back. It decides nothing."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from keyquorum_admission.config import Settings
from keyquorum_admission.logs import logger
from keyquorum_admission.metrics import Metrics
from keyquorum_admission.review import MAX_REVIEW, Answer, Seat, answer, denial
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError

__all__ = ["admission_app"]

_BODY_SECONDS: Final = 10.0
_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_log = logger()


def admission_app(settings: Settings, metrics: Metrics) -> Starlette:
    """``POST /v1/{mutate,validate}[/required]``, ``GET /healthz``, ``GET /metrics``."""

    async def review(request: Request) -> Response:
        seat = Seat(request.url.path.removeprefix("/v1/"))
        try:
            body = await _body(request)
        except KeyquorumError as error:
            given = denial("", error)
        else:
            given = _judged(settings, metrics, seat, body)
        metrics.count(seat, given)
        _tell(seat, given)
        return JSONResponse(given.document, given.status)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.text(), media_type=_METRICS_TYPE)

    return Starlette(
        routes=[
            *(Route(f"/v1/{seat}", review, methods=["POST"]) for seat in Seat),
            Route("/healthz", healthz),
            Route("/metrics", show_metrics),
        ]
    )


def _judged(settings: Settings, metrics: Metrics, seat: Seat, body: bytes) -> Answer:
    started = time.perf_counter()
    try:
        return answer(settings, seat, body)
    except Exception as error:  # a defect of ours must not become an answer that says nothing
        reference = secrets.token_hex(8)
        metrics.failures.inc()
        _log.exception("review.failed", reference=reference, error=type(error).__name__)
        return denial("", UnavailableError(Reason.INTERNAL, "the review could not be judged", actual=reference))
    finally:
        metrics.seconds.observe(time.perf_counter() - started)


async def _body(request: Request) -> bytes:
    """Raises :class:`MalformedError` for another type or too much of it, :class:`UnavailableError` for a slow one."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise MalformedError(
            Reason.UNSUPPORTED, "bad header Content-Type", expected="application/json", actual=media[:100]
        )
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_REVIEW:
                    raise MalformedError(
                        Reason.TOO_LARGE, "the AdmissionReview is too large", expected=f"at most {MAX_REVIEW} bytes"
                    )
    except TimeoutError:
        raise UnavailableError(Reason.TIMEOUT, "the request did not come in time") from None
    return bytes(data)


def _tell(seat: Seat, given: Answer) -> None:
    review = given.review
    if given.error is not None:
        _log.warning("review.malformed", seat=str(seat), reason=str(given.error.reason), message=given.error.message)
    if review is None:
        return
    said = {
        "seat": str(seat),
        "uid": review.uid,
        "operation": review.operation,
        "kind": review.kind,
        "namespace": review.namespace,
        "name": review.name,
        "dry_run": review.dry_run,
        "outcome": given.outcome,
    }
    if given.findings:
        rules = sorted({str(each.rule) for each in given.findings})
        _log.warning("review.refused", **said, rules=rules, fields=[each.field for each in given.findings[:8]])
    else:
        _log.info("review.answered", **said)
