#!/usr/bin/env bash
# Install the system packages that some tests need, where that is allowed; where not, those tests skip with the reason.
set -u
missing=()
for pair in swtpm:swtpm swtpm_setup:swtpm-tools tpm2_quote:tpm2-tools; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "not installed, so tests with a real TPM will skip: ${missing[*]}" >&2
    exit 0
fi
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >/dev/null 2>&1 || echo "could not be installed, so tests with a real TPM will skip: ${missing[*]}" >&2
exit 0
