"""The coordinator: keeps jobs and ciphertext, asks custodians, holds no secret and decides nothing about keys."""

__version__ = "0.1.0"
