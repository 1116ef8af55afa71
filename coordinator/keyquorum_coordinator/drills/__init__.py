"""Drills: rehearsed failures on a canary key, measured and signed (docs/drills.md)."""
