#!/usr/bin/env bash
# Install the system packages that some tests need, where that is allowed; where not, those tests skip with the reason.
set -u
missing=()
for pair in swtpm:swtpm swtpm_setup:swtpm-tools tpm2_quote:tpm2-tools; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
# The liboqs C library, for nested sealing suites: not every distribution packages it.
if command -v apt-cache >/dev/null 2>&1 && ! ldconfig -p 2>/dev/null | grep -q 'liboqs\.so'; then
    liboqs=$(apt-cache search --names-only '^liboqs[0-9]*$' 2>/dev/null | head -n 1 | cut -d ' ' -f 1)
    [ -n "$liboqs" ] && missing+=("$liboqs")
fi
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "not installed, so the tests that use them will skip: ${missing[*]}" >&2
    exit 0
fi
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >/dev/null 2>&1 || echo "could not be installed, so the tests that use them will skip: ${missing[*]}" >&2
exit 0
