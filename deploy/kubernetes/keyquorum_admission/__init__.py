"""Kubernetes admission: what carries ``compute.secure/require-attestation`` runs confidentially or not at all."""

__version__ = "0.1.0"
