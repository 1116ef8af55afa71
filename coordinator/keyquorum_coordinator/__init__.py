"""The coordinator: keeps jobs and ciphertext, asks custodians, holds no secret and decides nothing about keys."""

from importlib.metadata import version

__version__ = version("keyquorum-coordinator")
