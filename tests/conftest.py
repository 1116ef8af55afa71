"""For every test: gRPC's C core says nothing by itself on standard error, as in every process of ours."""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
