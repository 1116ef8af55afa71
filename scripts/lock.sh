#!/usr/bin/env bash
# Resolve every member's dependencies into requirements.lock: pinned, hashed, naming no index host.
set -euo pipefail
cd "$(dirname "$0")/.."
members=(core protos custodian coordinator client gpu_worker deploy/local deploy/kubernetes)
skip=()
for name in keyquorum-core keyquorum-protos keyquorum-custodian keyquorum-coordinator keyquorum keyquorum-gpu-worker; do
    skip+=(--no-emit-package "$name")
done
"${UV:-.venv/bin/uv}" pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    "${skip[@]}" -o requirements.lock scripts/dev-requirements.in "${members[@]/%//pyproject.toml}" "$@" >/dev/null
