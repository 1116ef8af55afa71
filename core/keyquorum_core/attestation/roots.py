"""The vendor roots this product knows, by SHA-256 of SubjectPublicKeyInfo (DER), lower-case hex.

Keys are pinned, not certificates: the certificates travel with the evidence, and a vendor may reissue one for the same
key. Knowing a root is not trusting it: a custodian trusts the roots that its reference values name, out of these, and a
development root only where they name it as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["AMD_ROOTS", "AWS_NITRO_ROOTS", "INTEL_ROOTS", "NVIDIA_DEVICE_ROOTS", "NVIDIA_RIM_ROOTS"]

AMD_ROOTS: Mapping[str, str] = MappingProxyType(
    {
        "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9": "Milan",
        "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831": "Genoa",
        "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08": "Turin",
    }
)
"""AMD root keys (ARK) and the one product line whose chips each vouches for."""

INTEL_ROOTS: Mapping[str, str] = MappingProxyType(
    {"a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e": "Intel SGX Root CA"}
)
"""Intel's root key for TDX and SGX; ``dcap-qvl`` holds its certificate too, and the two must agree."""

AWS_NITRO_ROOTS: Mapping[str, str] = MappingProxyType(
    {"f2caf5ecc6190b4a8399b78bc58a2bbcd0382375db8a1bfd78a82743874fd225": "AWS Nitro Enclaves Root G1"}
)
"""The root key of AWS Nitro Enclaves."""

NVIDIA_DEVICE_ROOTS: Mapping[str, str] = MappingProxyType(
    {"a90c4eb5acfd3e3d03a25db6a26b84f720ad0503196c627c21ddd48dd85b06a4": "NVIDIA Device Identity CA"}
)
"""The root key of NVIDIA's device certificates: GPUs, and switches too."""

NVIDIA_RIM_ROOTS: Mapping[str, str] = MappingProxyType(
    {"dec1dc316477aa851eebdf51327ae9f864bc8d89254657ed1e7eb9168af1e1a3": "NVIDIA CoRIM signing Root CA"}
)
"""The root key under which NVIDIA signs reference integrity manifests."""
