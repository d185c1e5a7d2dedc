#!/usr/bin/env bash
# usage: setup-debian.sh [--build] [--test] [--bench]
# Installs the Debian packages that building (--build), testing (--test, which includes --build) and scripts/bench.sh (--bench, which includes both)
# need; only what is missing.
# Works as root or with sudo. Services that come with test packages (NetworkManager for one) are not started.
# Rust is needed as well: rustup, or a cargo of at least the version in Cargo.toml; --build installs rustup where Debian has it.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What is looked for, and the package that has it: a command, or a path.
readonly BUILD=(cc:gcc /usr/include/stdio.h:libc6-dev git:git curl:curl /etc/ssl/certs/ca-certificates.crt:ca-certificates)
readonly TEST=(
    # Fixtures and scripts.
    mmdebstrap:mmdebstrap zstd:zstd lz4:lz4 readelf:binutils lsinitramfs:initramfs-tools-core pigz:pigz xz:xz-utils bzip2:bzip2 jq:jq column:bsdextrautils shellcheck:shellcheck npm:npm
    /usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
    # Filesystems, disks, and their judges.
    mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs mkfs.vfat:dosfstools mcopy:mtools sgdisk:gdisk sfdisk:fdisk losetup:mount
    unshare:util-linux setfattr:attr setfacl:acl setcap:libcap2-bin python3:python3-minimal /usr/lib/python3/dist-packages:python3
    qemu-img:qemu-utils ssh-keygen:openssh-client dropbearkey:dropbear-bin visudo:sudo file:file
    matchpathcon:selinux-utils semodule:policycoreutils
    # Registries: a server, and a client of somebody else's. Squashfs.
    docker-registry:docker-registry skopeo:skopeo mksquashfs:squashfs-tools
    # Signatures.
    gpg:gpg gpgconf:gpgconf gpg-agent:gpg-agent minisign:minisign age:age age-keygen:age
    # simplestreams' own tools and an S3 server (scripts/tools.sh).
    gpgv:gpgv /usr/share/doc/python3-venv:python3-venv
    # scripts/fuzz.sh: libFuzzer is C++.
    c++:g++
    # Guests: emulator and a busybox without libraries.
    qemu-system-x86_64:qemu-system-x86 /usr/share/seabios/bios-256k.bin:seabios busybox:busybox-static cpio:cpio
    # Boot loaders, and firmware to start them with.
    grub-mkimage:grub-common /usr/lib/grub/i386-pc/boot.img:grub-pc-bin /usr/lib/grub/x86_64-efi/modinfo.sh:grub-efi-amd64-bin
    /usr/share/OVMF/OVMF_CODE_4M.fd:ovmf
    # Mapping dialects: libvirt's schemas, xl's parser.
    bootctl:systemd-boot virt-xml-validate:libvirt-clients xmllint:libxml2-utils /usr/share/libvirt/schemas/domain.rng:libvirt0 xl:xen-utils-common
    # Guests' own network tools, run in namespaces.
    ip:iproute2 ifquery:ifupdown NetworkManager:network-manager netplan:netplan.io dbus-daemon:dbus /lib/systemd/systemd-networkd:systemd
)

# What is measured beside cloudletd and is not among the tests' judges.
readonly BENCH=(/usr/include/ext2fs/ext2fs.h:libext2fs-dev cloud-localds:cloud-image-utils genisoimage:genisoimage strace:strace guestfish:guestfish
    virt-customize:guestfs-tools '/boot/vmlinuz-*:linux-image-cloud-amd64')

as_root() {
    if [[ $EUID -eq 0 ]]; then "$@"; else sudo "$@"; fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get --option DPkg::Lock::Timeout=400 --option Acquire::Retries=3 --quiet=2 --yes "$@" >/dev/null
}

updated=no
update_once() {
    [[ $updated == yes ]] || apt update
    updated=yes
}

missing() { # ENTRY...: the packages of what is not there
    local entry what
    for entry in "$@"; do
        what=${entry%%:*}
        # Programs for root are not in everybody's PATH.
        if [[ $what == /* ]]; then compgen -G "$what" >/dev/null; else PATH=$PATH:/usr/sbin:/sbin command -v "$what" >/dev/null; fi || echo "${entry#*:}"
    done
}

install() { # PACKAGE...
    [[ $# -gt 0 ]] || return 0
    echo "installing $*"
    update_once
    # policy-rc.d keeps services from starting; one that is there already is respected.
    local policy=/usr/sbin/policy-rc.d own=no status=0
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
        as_root chmod 0755 $policy
        own=yes
    fi
    apt install --no-install-recommends "$@" || status=$?
    [[ $own == no ]] || as_root rm --force $policy
    return $status
}

# loopdev's build script reads a kernel header with libclang; the versioned library alone is a tenth of libclang-dev.
install_libclang() {
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null && return
    update_once
    local version
    version=$(apt-cache depends libclang-dev | sed --quiet 's/.*Depends: libclang-\([0-9]*\)-dev.*/\1/p')
    install "libclang1-$version"
}

# xl's parser library is in the package named after Xen's version.
install_xen_utils() {
    compgen -G '/usr/lib/xen-*/bin/xl' >/dev/null && return
    update_once
    local package
    package=$(apt-cache search --names-only '^xen-utils-[0-9.]*$' | sort --version-sort | tail --lines=1 | cut --delimiter=' ' --fields=1)
    install "$package"
}

# cloud-init gives a second opinion on network documents. Unpacked with the modules it needs and not installed: it would take over this machine's
# configuration at the next boot.
unpack_cloud_init() {
    local place=$here/../target/tools/cloud-init scratch
    [[ ! -d $place/usr/lib/python3/dist-packages/cloudinit ]] || return 0
    update_once
    local -a packages options=(--recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances)
    mapfile -t packages < <(apt-cache depends cloud-init "${options[@]}" | grep '^python3-' | grep --invert-match --extended-regexp -- '-(minimal|distutils|lib2to3|dbg)$' | sort --unique)
    echo "unpacking cloud-init"
    scratch=$(mktemp --directory)
    (cd "$scratch" && apt-get --quiet=2 download cloud-init "${packages[@]}" 2>/dev/null)
    mkdir --parents "$place"
    local package
    for package in "$scratch"/*.deb; do dpkg-deb --extract "$package" "$place"; done
    rm --recursive --force "$scratch"
}

check_rust() {
    local wanted have=""
    wanted=$(sed --quiet 's/^rust-version = "\(.*\)"/\1/p' "$here/../Cargo.toml")
    if ! command -v cargo >/dev/null; then
        update_once
        apt-cache show rustup >/dev/null 2>&1 && install rustup && rustup toolchain install --profile minimal --component clippy,rustfmt "$wanted"
    fi
    ! command -v cargo >/dev/null || have=$(cargo --version | cut --delimiter=' ' --fields=2)
    if [[ -z $have || $(printf '%s\n' "$wanted" "$have" | sort --version-sort | head --lines=1) != "$wanted" ]]; then
        echo "setup-debian.sh: Rust $wanted or newer is needed, found ${have:-none}: install rustup (https://rustup.rs) and run: rustup toolchain install $wanted" >&2
        return 1
    fi
}

level=none
for argument in "$@"; do
    case "$argument" in
        --build) [[ $level != none ]] || level=build ;;
        --test) [[ $level == bench ]] || level="test" ;;
        --bench) level=bench ;;
        *) sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; [[ $argument == --help ]] && exit 0; exit 2 ;;
    esac
done
[[ $level != none ]] || { echo "setup-debian.sh: --build, --test or --bench is needed" >&2; exit 2; }

mapfile -t packages < <(missing "${BUILD[@]}"; [[ $level == build ]] || missing "${TEST[@]}"; [[ $level != bench ]] || missing "${BENCH[@]}")
install "${packages[@]}"
install_libclang
[[ $level == build ]] || { install_xen_utils; unpack_cloud_init; }
check_rust
