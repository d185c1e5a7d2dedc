#!/usr/bin/env bash
# usage: test.sh
# Everything that has to hold before a change goes in, on a Debian machine with root: formatting, lints, protocol files, shell scripts, units,
# and all tests: unit, api, root_* (loop devices, mounts, mkfs) and boot_* (QEMU). Installs what it needs. Ends with cargo's own closing lines.
# Everything it makes is kept below target/ (or $CARGO_TARGET_DIR and $CLOUDLETD_FIXTURES): a second run is minutes shorter.

set -euo pipefail
[[ ${1:-} != --help ]] || { sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() {
    printf '\n== %s (%d s)\n' "$*" "$SECONDS"
}

[[ $EUID -eq 0 ]] || { echo "test.sh: the root_* and boot_* tests need root" >&2; exit 1; }
PATH=$PATH:/usr/sbin:/sbin

step "packages and tools"
scripts/setup-debian.sh --test
step "format"
cargo fmt --check
step "shell scripts"
while read -r script; do
    bash -n "$script"
done < <(find scripts .ci -type f ! -name '*.py' ! -name '*.c')
find scripts .ci -type f ! -name '*.py' ! -name '*.c' -print0 | xargs --null shellcheck --external-sources --source-path=.
shellcheck --shell=sh tests/common/boot/*.sh
step "protocol files"
scripts/tools.sh buf
(cd proto && ../target/tools/node_modules/.bin/buf lint)
# Made while the compiler works: they wait for mirrors and for dpkg.
scratch=$(mktemp --directory)
setsid bash -c 'scripts/tools.sh && scripts/fixtures.sh' >"$scratch/made" 2>&1 &
making=$!
trap 'kill -- "-$making" 2>/dev/null || true; rm --recursive --force "$scratch"' EXIT
step "lints"
cargo clippy --locked --all-targets -- --deny warnings
step "build"
cargo test --locked --no-run
binary=${CARGO_TARGET_DIR:-target}/debug/cloudletd
step "configuration and units"
"$binary" config check systemd/cloudletd.toml.example
# The units name /usr/bin/cloudletd; verify wants the program to exist.
for unit in systemd/*.service systemd/*.socket; do
    sed "s|/usr/bin/cloudletd|$(realpath "$binary")|" "$unit" >"$scratch/${unit##*/}"
done
systemd-analyze verify --man=no "$scratch"/*.service "$scratch"/*.socket
# The scores that the units' headers state, times ten.
systemd-analyze security --offline=yes --threshold=17 systemd/cloudletd.service >/dev/null
systemd-analyze security --offline=yes --threshold=33 systemd/cloudletd-keeper.service >/dev/null
step "tools and root filesystems"
wait "$making" || { cat "$scratch/made" >&2; exit 1; }
cat "$scratch/made"
step "tests"
cargo test --locked --no-fail-fast
