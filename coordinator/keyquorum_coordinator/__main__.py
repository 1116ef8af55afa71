"""``python -m keyquorum_coordinator``."""

from __future__ import annotations

from keyquorum_coordinator.cli import main

main()
