#!/usr/bin/env bash
# Makes the images of this directory again: small filesystems by mke2fs (1.47) with features that our own formatter does not use.
# Needs root (device nodes, xattrs).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
work=$(mktemp --directory)
trap 'rm --recursive --force "$work"' EXIT
export MKE2FS_DEVICE_SECTSIZE=512

tree=$work/tree
mkdir --parents "$tree"/{etc,run,var,usr/lib/deep/er,many}
echo golden >"$tree/etc/hostname"
echo "127.0.0.1 localhost" >"$tree/etc/hosts"
ln "$tree/etc/hosts" "$tree/etc/hosts.link"
ln --symbolic ../usr/lib "$tree/etc/fast"
ln --symbolic "$(printf 'x/%.0s' {1..200})" "$tree/etc/slow"
ln --symbolic loop "$tree/etc/loop"
ln --symbolic /run "$tree/var/run"
echo x >"$tree/usr/lib/deep/er/file"
mknod "$tree/etc/null" c 1 3
for i in {000..149}; do : >"$tree/many/a-file-with-a-name-that-is-long-enough-to-fill-blocks-$i"; done
# Every other block, up to where the second indirect block begins.
for i in {0..19}; do printf s | dd of="$tree/var/sparse" bs=1 seek=$((i * 16384)) conv=notrunc status=none; done

make() { # NAME SIZE ARGUMENT...
    local image=$work/$1.img
    mke2fs -q -q -F -t ext4 -U 01234567-89ab-4def-8123-456789abcdef -E hash_seed=11234567-89ab-4def-8123-456789abcdef -d "$tree" "${@:3}" "$image" "$2"
    for request in "ea_set /etc/hostname user.small vvv" "ea_set /etc/hosts user.large $(printf 'v%.0s' {1..300})"; do
        debugfs -w -R "$request" "$image" 2>/dev/null
    done
    e2fsck -fyD "$image" &>/dev/null || [[ $? == 1 ]]
    gzip --best --no-name --stdout "$image" >"$1.img.gz"
}

make 1k-ext3-like 2M -b 1024 -N 256 -O '^extent,^64bit,^metadata_csum,^flex_bg,^huge_file,^uninit_bg,^has_journal'
make 1k 10M -b 1024 -N 512 -g 4096 -O metadata_csum,64bit -J size=1
make uninit-bg 16M -b 4096 -N 256 -O '^metadata_csum,uninit_bg,^has_journal'
make no-flex-bg 4M -b 1024 -N 512 -g 2048 -O '^flex_bg,^resize_inode,^has_journal,metadata_csum_seed'
