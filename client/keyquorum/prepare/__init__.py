"""Preparing data at home, before a job takes it abroad (docs/prepare.md).

::

    from keyquorum import prepare

    made = prepare.prepare("profile.toml", "cohort.toml", "cohort.csv", "job/cohort.parquet", mapping="cohort.mapping")

PyArrow, and OpenDP for aggregates, come with the extra ``keyquorum[prepare]``; they are imported when first needed.
"""

from __future__ import annotations

from keyquorum.prepare.budget import Budget, PrivacyLedger, Spending, ledger_path
from keyquorum.prepare.pipeline import Pipeline, load_pipeline, parse_pipeline
from keyquorum.prepare.sessions import check, detokenize, prepare

__all__ = [
    "Budget",
    "Pipeline",
    "PrivacyLedger",
    "Spending",
    "check",
    "detokenize",
    "ledger_path",
    "load_pipeline",
    "parse_pipeline",
    "prepare",
]
