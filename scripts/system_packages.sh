#!/usr/bin/env bash
# Install the system packages that some tests need, where that is allowed; where not, those tests skip with the reason.
set -u
cd "$(dirname "$0")/.."
missing=()
for pair in swtpm:swtpm swtpm_setup:swtpm-tools tpm2_quote:tpm2-tools softhsm2-util:softhsm2; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
# Several coordinators share one log over PostgreSQL; its server's programs are not on the path.
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null 2>&1 || missing+=(postgresql)
# The liboqs C library, for nested sealing suites: not every distribution packages it.
if command -v apt-cache >/dev/null 2>&1 && ! ldconfig -p 2>/dev/null | grep -q 'liboqs\.so'; then
    liboqs=$(apt-cache search --names-only '^liboqs[0-9]*$' 2>/dev/null | head -n 1 | cut -d ' ' -f 1)
    [ -n "$liboqs" ] && missing+=("$liboqs")
fi
# What the TPM's Python library is built with. A compiler is nothing that tests may install.
pytss=""
if ! TSS2_LOG=all+NONE .venv/bin/python -c "import tpm2_pytss" >/dev/null 2>&1; then
    if command -v gcc >/dev/null 2>&1 && command -v pkg-config >/dev/null 2>&1; then
        pytss=wanted
        pkg-config --exists tss2-esys || missing+=(libtss2-dev)
    else
        echo "no gcc or no pkg-config, so the tests of a worker with a real TPM will skip" >&2
    fi
fi
if [ ${#missing[@]} -ne 0 ]; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "not installed, so the tests that use them will skip: ${missing[*]}" >&2
    elif ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1; then
        echo "could not be installed, so the tests that use them will skip: ${missing[*]}" >&2
    fi
fi
if [ -n "$pytss" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
        -r scripts/tpm-requirements.txt >/dev/null 2>&1 ||
        echo "tpm2-pytss could not be built, so the tests of a worker with a real TPM will skip" >&2
fi
exit 0
