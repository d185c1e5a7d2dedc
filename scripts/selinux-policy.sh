#!/bin/bash
# Builds Debian's SELinux policy below a directory, for the tests that compare labels with libselinux: DIR/etc/selinux/default/contexts/files.
# The policy is extracted, not installed: the machine's own configuration stays as it is.

set -euo pipefail

usage() {
    cat <<'TEXT'
usage: selinux-policy.sh DIR

Makes DIR unless it is there. Needs root, apt-get with a reachable mirror, and semodule (package policycoreutils).
TEXT
}

[[ $# -eq 1 && $1 != --help ]] || { usage; [[ ${1:-} == --help ]] && exit 0 || exit 2; }
readonly dir=$1
mkdir -p "$(dirname "$dir")"
exec 9>"$dir.lock"
flock 9
[[ ! -d $dir ]] || exit 0
command -v semodule >/dev/null || { echo "selinux-policy.sh: semodule is missing: install policycoreutils" >&2; exit 1; }

# Beside it, so that it gets there by a rename.
work=$(mktemp --directory --tmpdir="$(dirname "$dir")")
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get --quiet=2 --option APT::Sandbox::User=root download selinux-policy-default >/dev/null)
dpkg-deb --extract "$work"/selinux-policy-default_*.deb "$work/package"
mkdir -p "$work/root/var/lib/selinux/default" "$work/root/etc"
cp --recursive "$work/package/etc/selinux" "$work/root/etc/"
# It says on stderr that users of the machine are unknown, which does not matter here.
semodule --path="$work/root" --store=default --noreload --priority=100 --install "$work"/package/usr/share/selinux/default/*.pp.bz2 2>/dev/null
test -s "$work/root/etc/selinux/default/contexts/files/file_contexts"
mv "$work/root" "$dir"
