#!/usr/bin/env bash
# Makes the Debian root filesystem tarballs that the tests and the quickstart render, with a kernel and one network tool each.
#
# Layout of the directory (default target/fixtures, or $CLOUDLETD_FIXTURES):
#   NAME.tar.zst   the root filesystem, as an image's tarball
#   NAME.key       digest of the suite, the packages and this script: a fixture is rebuilt when it differs
#   NAME/          kernel (vmlinuz), the image's own initrd (initrd.img), lib/modules: what a direct boot needs
#   e2fsprogs-SUITE/   that release's e2fsck, the libraries it needs and their loader: judges of ext4 images besides the host's own
# One base per suite holds the kernel and what all fixtures share, so that each further fixture costs seconds.
# The mirror is the one apt is configured with on this machine; $CLOUDLETD_MIRROR overrides it, and $CLOUDLETD_OLD_MIRROR is where releases are that it
# no longer carries.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: fixtures.sh [--list] [NAME...]

Makes the named root filesystem fixtures, or all of them, unless they are cached. Needs root, mmdebstrap and zstd.

  --list    print the names and exit
  --help    print this text

environment: CLOUDLETD_FIXTURES (where they are kept), CLOUDLETD_MIRROR and CLOUDLETD_OLD_MIRROR (URLs of Debian mirrors), CLOUDLETD_FIXTURE_JOBS (default 2)
TEXT
}

# Suite and packages of each fixture, on top of the base. A resolver is in some and not in others on purpose: with
# systemd-resolved /etc/resolv.conf is a symlink to a stub, without it a plain file.
fixture_packages() {
    case "$1" in
        bookworm-ifupdown) echo ifupdown ;;
        # Debian's signed boot loaders, and what their update-grub needs.
        bookworm-signed-ifupdown) echo ifupdown,shim-signed,grub-efi-amd64-signed,grub-efi-amd64 ;;
        # systemd-boot and no GRUB.
        bookworm-sdboot-ifupdown) echo ifupdown,systemd-boot ;;
        bookworm-networkd) echo systemd-resolved ;;
        bookworm-networkmanager) echo network-manager ;;
        bookworm-netplan) echo netplan.io,systemd-resolved ;;
        trixie-ifupdown) echo ifupdown ;;
        # On trixie nothing but systemd itself: networkd without resolved.
        trixie-networkd) echo "" ;;
        trixie-networkmanager) echo network-manager ;;
        trixie-netplan) echo netplan.io,systemd-resolved ;;
        e2fsprogs-*) echo e2fsprogs ;;
        *) return 1 ;;
    esac
}
# Releases whose e2fsck judges images: 1.46.2 and 1.47.2; the host's own is another.
readonly FIXTURES=(bookworm-ifupdown bookworm-signed-ifupdown bookworm-sdboot-ifupdown trixie-ifupdown bookworm-networkd bookworm-networkmanager bookworm-netplan
    trixie-networkd trixie-networkmanager trixie-netplan e2fsprogs-bullseye e2fsprogs-trixie)
# The cloud kernel has virtio, ext4, xfs and btrfs at a third of the size of the full one. openssh-server brings host keys
# that every instance must lose.
readonly BASE_PACKAGES=linux-image-cloud-amd64,iproute2,openssh-server,systemd-sysv,udev,dbus,kmod,netbase,ca-certificates

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${CLOUDLETD_FIXTURES:-$here/../target/fixtures}
export SOURCE_DATE_EPOCH=1700000000

configured_mirror() { # Empty while apt's lists are empty, as in a fresh container.
    # shellcheck disable=SC2016 # The names are apt's, not the shell's.
    apt-get indextargets --format '$(REPO_URI) $(COMPONENT) $(LABEL)' 'Created-By: Packages' | awk '$2 == "main" && $3 == "Debian" && !found { print $1; found = 1 }'
}

find_mirror() {
    mirror=${CLOUDLETD_MIRROR:-$(configured_mirror)}
    if [[ -z $mirror ]]; then
        apt-get -o DPkg::Lock::Timeout=400 --quiet=2 update >&2
        mirror=$(configured_mirror)
    fi
    if [[ -z $mirror ]]; then
        echo "fixtures.sh: apt has no Debian archive configured here (set CLOUDLETD_MIRROR)" >&2
        return 1
    fi
}

# bootstrap LOG ARGS...: mmdebstrap with what base and fixtures share. Documents and locales are not installed: they cost a
# third of the time and no test reads them.
bootstrap() {
    local log=$1
    shift
    mmdebstrap --mode=root --logfile="$log" --format=tar \
        --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
        --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' "$@"
}

key_of() { # SUITE PACKAGES FUNCTION...: what decides whether a cached file is still right; the recipes themselves are part of it
    local suite=$1 packages=$2
    shift 2
    { printf '%s\n%s\n' "$suite" "$packages"; declare -f bootstrap "$@"; } | sha256sum | cut -d' ' -f1
}

fresh() { # NAME KEY
    [[ -s $dir/$1.tar.zst && $(cat "$dir/$1.key" 2>/dev/null) == "$2" ]]
}

publish() { # NAME KEY: the key is written last, so an interrupted build is never taken for a finished one
    rm -f "$dir/$1.key"
    mv "$dir/.$1.tmp" "$dir/$1.tar.zst"
    echo "$2" >"$dir/$1.key"
}

make_base() { # SUITE
    local suite=$1 name=base-$1 key
    key=$(key_of "$suite" "$BASE_PACKAGES" make_base)
    exec {lock}>"$dir/.$name.lock"
    flock "$lock"
    if ! fresh "$name" "$key"; then
        # Variants install from the lists the base already has.
        bootstrap "$dir/$name.log" --variant=minbase --include="$BASE_PACKAGES" --skip=cleanup/apt/lists "$suite" - "$mirror" | zstd -q -1 -f -o "$dir/.$name.tmp"
        publish "$name" "$key"
    fi
    exec {lock}>&-
}

make_fixture() { # NAME
    local name=$1 suite=${1%%-*} packages key started=$SECONDS
    packages=$(fixture_packages "$name") || { echo "fixtures.sh: no fixture named $name" >&2; return 1; }
    key=$(key_of "$suite" "$BASE_PACKAGES:$packages" make_base make_fixture)
    exec {own}>"$dir/.$name.lock"
    flock "$own"
    if fresh "$name" "$key"; then
        echo "$name: cached"
        return
    fi
    make_base "$suite"
    # The build host's name and resolver, which mmdebstrap copies in, are replaced by values that a correct instance must not show.
    # shellcheck disable=SC2016 # $1 is mmdebstrap's tree, expanded by the hook's own shell.
    bootstrap "$dir/$name.log" --variant=custom --skip=update ${packages:+--include="$packages"} \
        --setup-hook="tar -C \"\$1\" --zstd --xattrs --xattrs-include='*' --numeric-owner -xf '$dir/base-$suite.tar.zst'" \
        --customize-hook='rm -f "$1/etc/hostname" && echo stale-template >"$1/etc/hostname" && chmod 0644 "$1/etc/hostname"' \
        --customize-hook='test -L "$1/etc/resolv.conf" || { rm -f "$1/etc/resolv.conf" && echo "nameserver 192.0.2.254" >"$1/etc/resolv.conf" && chmod 0644 "$1/etc/resolv.conf"; }' \
        "$suite" - | zstd -q -3 -f -o "$dir/.$name.tmp"
    rm -rf "${dir:?}/$name" "${dir:?}/.$name.d"
    mkdir -p "$dir/.$name.d"
    # tar runs zstd itself: in a pipe zstd would die of SIGPIPE when tar stops at the end mark.
    tar -C "$dir/.$name.d" --zstd --wildcards --no-same-owner -xf "$dir/.$name.tmp" './boot/vmlinuz-*' './boot/initrd.img-*' './usr/lib/modules'
    mv "$dir/.$name.d"/boot/vmlinuz-* "$dir/.$name.d/vmlinuz"
    mv "$dir/.$name.d"/boot/initrd.img-* "$dir/.$name.d/initrd.img"
    mv "$dir/.$name.d/usr/lib" "$dir/.$name.d/lib"
    rmdir "$dir/.$name.d/boot" "$dir/.$name.d/usr"
    mv "$dir/.$name.d" "$dir/$name"
    publish "$name" "$key"
    echo "$name: made in $((SECONDS - started)) s, $(stat --format=%s "$dir/$name.tar.zst") bytes"
}

# extract SUITE MIRROR DIRECTORY: e2fsprogs and what it depends on, unpacked and not configured
extract() {
    mmdebstrap --mode=root --quiet --variant=extract --include=e2fsprogs --skip=check/empty \
        --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' "$1" "$3" "$2"
}

# A directory to run from: DIRECTORY/ld-linux* --library-path DIRECTORY DIRECTORY/e2fsck.
make_e2fsprogs() { # NAME
    local name=$1 suite=${1#*-} key started=$SECONDS tree=$dir/.$1.tree
    key=$(key_of "$suite" e2fsprogs extract make_e2fsprogs)
    exec {own}>"$dir/.$name.lock"
    flock "$own"
    if [[ -x $dir/$name/e2fsck && $(cat "$dir/$name.key" 2>/dev/null) == "$key" ]]; then
        echo "$name: cached"
        return
    fi
    rm -rf "$tree" "$dir/.$name.d" "$dir/$name.key" "${dir:?}/$name"
    # Releases that the mirror no longer carries are in Debian's archive of old ones.
    extract "$suite" "${CLOUDLETD_OLD_MIRROR:-$mirror}" "$tree"
    mkdir "$dir/.$name.d"
    # -L: some are links, and absolute ones would lead out of the tree.
    find "$tree" '(' -path '*/sbin/e2fsck' -o -path '*/lib/*/ld-linux*' -o -path '*/lib/*/lib*.so.*' ')' ! -type d -exec cp -L --preserve=mode -t "$dir/.$name.d" {} +
    rm -rf "$tree"
    mv "$dir/.$name.d" "$dir/$name"
    echo "$key" >"$dir/$name.key"
    echo "$name: made in $((SECONDS - started)) s"
}

names=()
for argument in "$@"; do
    case "$argument" in
        --help) usage; exit 0 ;;
        --list) printf '%s\n' "${FIXTURES[@]}"; exit 0 ;;
        -*) usage >&2; exit 2 ;;
        *) fixture_packages "$argument" >/dev/null || { echo "fixtures.sh: no fixture named $argument" >&2; exit 2; }
           names+=("$argument") ;;
    esac
done
[[ ${#names[@]} -gt 0 ]] || names=("${FIXTURES[@]}")
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
for tool in mmdebstrap zstd flock; do
    command -v "$tool" >/dev/null || { echo "fixtures.sh: $tool is not installed (scripts/setup-debian.sh --test installs it)" >&2; exit 1; }
done
[[ $EUID -eq 0 ]] || { echo "fixtures.sh: mmdebstrap needs root here" >&2; exit 1; }

find_mirror
failed=0
running=0
for name in "${names[@]}"; do
    if (( running >= ${CLOUDLETD_FIXTURE_JOBS:-2} )); then
        wait -n || failed=1
        running=$((running - 1))
    fi
    case "$name" in
        e2fsprogs-*) make_e2fsprogs "$name" & ;;
        *) make_fixture "$name" & ;;
    esac
    running=$((running + 1))
done
while (( running > 0 )); do
    wait -n || failed=1
    running=$((running - 1))
done
exit "$failed"
