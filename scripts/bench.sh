#!/usr/bin/env bash
# usage: bench.sh [--runs N] [--section NAME]...
# Measures cloudletd beside what operators do by hand: same input, same durability (everything is flushed), page cache warm on both sides, runs
# interleaved A B A B. Needs root and an otherwise quiet machine; the load is recorded with the results.
#   --runs N         rounds per comparison (default 5); the tables show medians, least and greatest
#   --section NAME   only this: cold, small-files, flat, edit, warm, block, appliance, load, memory, cost, start (default: all)
# Inputs are made once and kept in target/bench/inputs ($CLOUDLETD_BENCH_DIR moves target/bench): a Debian root filesystem of scripts/fixtures.sh in four
# compressions, 120,000 small files, and as many in one directory. Needs what scripts/setup-debian.sh --bench installs. Writes results.md, results.json, samples.tsv and two SVG plots to target/bench.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
PATH=$PATH:/usr/sbin:/sbin

runs=5 sections=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --runs) runs=${2:?}; shift ;;
        --section) sections+=("${2:?}"); shift ;;
        --help) sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "bench.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done
[[ ${#sections[@]} -gt 0 ]] || sections=(cold small-files flat edit warm block appliance load memory cost start)
[[ $EUID -eq 0 ]] || { echo "bench.sh: root is needed (loop devices, mounts)" >&2; exit 1; }
for tool in jq python3 zstd xz gzip mkfs.ext4 mke2fs debugfs mkfs.xfs qemu-img cloud-localds guestfish virt-customize strace cargo cc /usr/include/ext2fs/ext2fs.h; do
    [[ -e $tool ]] || command -v "$tool" >/dev/null || { echo "bench.sh: $tool is not installed (scripts/setup-debian.sh --bench installs it)" >&2; exit 1; }
done

dir=${CLOUDLETD_BENCH_DIR:-$root/target/bench}
mkdir --parents "$dir/inputs"
dir=$(realpath "$dir")
work=$dir/work
samples=$dir/samples.tsv
daemon=
GOLDEN_SIZE=4G
# The crate that makes ext4 from a directory, by its example program.
readonly MKEXT4=0.0.3

clean_up() {
    [[ -z $daemon ]] || { kill "$daemon" 2>/dev/null && wait "$daemon" 2>/dev/null; } || true
    for mount in "$work/mnt" "$work/xfs"; do
        ! mountpoint --quiet "$mount" || umount "$mount"
    done
    [[ -z ${device:-} ]] || losetup --detach "$device" || true
    rm --recursive --force "$work" "${tmp_tree:-}"
}
trap clean_up EXIT
rm --recursive --force "$work"
mkdir --parents "$work/mnt" "$work/xfs" "$work/volumes"
: >"$samples"

say() {
    printf '== %s\n' "$*" >&2
}

# ---- Inputs

inputs() {
    "$here/fixtures.sh" bookworm-ifupdown >&2
    local fixtures key
    fixtures=$(realpath "${CLOUDLETD_FIXTURES:-$root/target/fixtures}")
    key=$(cat "$fixtures/bookworm-ifupdown.key")
    cd "$dir/inputs"
    if [[ $(cat debian.key 2>/dev/null) != "$key" ]]; then
        say "inputs: Debian, four compressions"
        rm --force debian.*
        zstd --decompress --quiet "$fixtures/bookworm-ifupdown.tar.zst" -o debian.tar
        gzip --keep debian.tar
        xz --threads=0 --keep debian.tar
        zstd --quiet -3 debian.tar
        echo "$key" >debian.key
    fi
    if [[ $(cat small.key 2>/dev/null) != 1 ]]; then
        say "inputs: 120,000 small files"
        python3 "$here/bench/small_files.py" small.tar
        echo 1 >small.key
    fi
    if [[ $(cat flat.key 2>/dev/null) != 1 ]]; then
        say "inputs: 120,000 files in one directory"
        python3 "$here/bench/small_files.py" flat.tar --flat
        echo 1 >flat.key
    fi
    cat ./*.tar* >/dev/null
    cd "$root"
}

programs() {
    say "build"
    local found
    cargo build --locked --release --bin cloudletd --manifest-path "$root/Cargo.toml"
    found=$(cargo build --locked --release --bench cold_build --bench render_load --message-format=json --manifest-path "$root/Cargo.toml" |
        jq --raw-output 'select(.reason == "compiler-artifact" and .executable != null) | "\(.target.name) \(.executable)"')
    cold_build=$(awk '$1 == "cold_build" { print $2 }' <<<"$found")
    render_load=$(awk '$1 == "render_load" { print $2 }' <<<"$found")
    cloudletd=${CARGO_TARGET_DIR:-$root/target}/release/cloudletd
    mkext4=$root/target/tools/mkext4-$MKEXT4/bin/mkfs
    [[ -x $mkext4 ]] || cargo install --quiet --locked --root "${mkext4%/bin/mkfs}" --target-dir "$work/mkext4" mkext4 --version "$MKEXT4" --example mkfs
    cc -O2 -o "$work/edit" "$here/bench/edit.c" -lext2fs -lcom_err
}

# ---- Measuring

sample() { # SECTION CASE WHO MILLISECONDS
    [[ -n $4 ]] || { echo "bench.sh: $1, $2, $3: no figure, see above" >&2; exit 1; }
    local IFS=$'\t'
    echo "$*" >>"$samples"
}

# timed SECTION CASE WHO COMMAND...: the whole command, as a person would wait for it
timed() {
    local section=$1 case=$2 who=$3 begun=${EPOCHREALTIME/./} ended
    shift 3
    "$@"
    ended=${EPOCHREALTIME/./}
    sample "$section" "$case" "$who" "$(awk -v us=$((ended - begun)) 'BEGIN { printf "%.3f", us / 1000 }')"
}

start_daemon() { # STATE-DIRECTORY POOL-DIRECTORY [FURTHER-CONFIGURATION]
    cat >"$work/cloudletd.toml" <<TOML
state_dir = "$1"
[listen]
unix = "$work/socket"
[fetch]
file_roots = ["$dir/inputs"]
[golden]
size = "4 GiB"
[[pool]]
name = "default"
kind = "directory"
path = "$2"
${3-}
TOML
    "$cloudletd" serve --config "$work/cloudletd.toml" 2>"$work/cloudletd.log" &
    daemon=$!
    client answer --since "${EPOCHREALTIME/./}" >/dev/null || { cat "$work/cloudletd.log" >&2; exit 1; }
}

stop_daemon() {
    kill "$daemon"
    wait "$daemon" || true
    daemon=
}

client() {
    "$render_load" --socket "$work/socket" "$@"
}

unpack() { # TARBALL: plain tar to standard output, by the fastest program there is
    case "$1" in
        *.gz) if command -v pigz >/dev/null; then pigz --decompress --stdout "$1"; else gzip --decompress --stdout "$1"; fi ;;
        *.xz) xz --threads=0 --decompress --stdout "$1" ;;
        *.zst) zstd --decompress --quiet --stdout "$1" ;;
        *) cat "$1" ;;
    esac
}

untar() { # TARBALL DIRECTORY
    unpack "$1" | tar --extract --directory="$2" --xattrs --xattrs-include='*' --numeric-owner --file=-
}

# ---- Cold builds

by_mount() { # TARBALL
    truncate --size="$GOLDEN_SIZE" "$work/peer.raw"
    mkfs.ext4 -q -F "$work/peer.raw"
    mount -o loop "$work/peer.raw" "$work/mnt"
    untar "$1" "$work/mnt"
    umount "$work/mnt"
    sync "$work/peer.raw"
}

by_mke2fs() { # TARBALL
    untar "$1" "$tmp_tree"
    mke2fs -q -F -t ext4 -d "$tmp_tree" "$work/peer.raw" "$GOLDEN_SIZE" >/dev/null 2>&1
    sync "$work/peer.raw"
}

by_mkext4() { # TARBALL
    untar "$1" "$tmp_tree"
    "$mkext4" "$tmp_tree" "$work/peer.raw" $((${GOLDEN_SIZE%G} << 30)) >/dev/null 2>&1
    sync "$work/peer.raw"
}

# From a copy of the tree in memory. ROUND: mke2fs -d searches a directory for each of its files: with 60,000 in one it takes minutes, so once is enough, and
# with 120,000 it is not tried. mkext4 keeps no extended attributes and takes sparse files for full ones.
by_trees() { # SECTION CASE TARBALL ROUND
    local who function
    for who in mke2fs mkext4; do
        [[ $who != mke2fs || $1 == cold || $1 == small-files && $4 == 0 ]] || continue
        function=by_$who
        [[ $who != mke2fs ]] || who="mke2fs -d"
        tmp_tree=$(mktemp --directory --tmpdir=/dev/shm)
        timed "$1" "$2" "tar + $who" "$function" "$3"
        rm --recursive --force "$work/peer.raw" "$tmp_tree"
    done
}

decompress_alone() { unpack "$1" >/dev/null; }
write_alone() { cp --reflink=never --sparse=always "$1" "$work/peer.raw"; sync "$work/peer.raw"; }

# The last two are the parts that nobody can do without; report.py makes the budget of them.
cold_case() { # SECTION CASE TARBALL
    local answer image golden round
    say "$1: $2"
    answer=$(client image "$3")
    image=$(jq --raw-output .image <<<"$answer") golden=$(jq --raw-output .golden <<<"$answer")
    for (( round = 0; round < runs; round++ )); do
        sample "$1" "$2" cloudletd "$(client cold "$image" | jq .ms)"
        timed "$1" "$2" "mkfs.ext4 + mount + tar" by_mount "$3"
        rm --force "$work/peer.raw"
        by_trees "$1" "$2" "$3" "$round"
        timed "$1" "$2" "decompress alone" decompress_alone "$3"
        timed "$1" "$2" "write + fsync alone" write_alone "$golden"
        rm --force "$work/peer.raw"
    done
}

cold() {
    local compression
    start_daemon "$work/state" "$work/volumes"
    for compression in .zst .gz .xz ''; do
        cold_case cold ".tar$compression" "$dir/inputs/debian.tar$compression"
    done
    stop_daemon
}

small_files() {
    start_daemon "$work/state" "$work/volumes"
    cold_case small-files "120,000 files, .tar" "$dir/inputs/small.tar"
    stop_daemon
}

flat() {
    start_daemon "$work/state" "$work/volumes"
    cold_case flat "120,000 files in one directory, .tar" "$dir/inputs/flat.tar"
    stop_daemon
}

# ---- Edits

EDITED=(etc/hostname etc/hosts etc/machine-id etc/fstab etc/resolv.conf etc/network/interfaces root/.ssh/authorized_keys etc/ssh/ssh_host_ed25519_key
    etc/ssh/ssh_host_ed25519_key.pub etc/ssh/ssh_host_ecdsa_key etc/ssh/ssh_host_ecdsa_key.pub)

edit_by_mount() {
    local path
    mount -o loop "$work/edit-mount.raw" "$work/mnt"
    mkdir --parents "$work/mnt/root/.ssh"
    for path in "${EDITED[@]}"; do
        printf 'new content of %s\n' "$path" >"$work/mnt/$path"
    done
    umount "$work/mnt"
    sync "$work/edit-mount.raw"
}

edit_by_libext2fs() {
    sample edit "11 files, 10 GiB" "libext2fs in C, durable" "$("$work/edit" "$work/edit-libext2fs.raw" "$work/content" "${EDITED[@]}")"
}

edit_by_debugfs() {
    debugfs -w -f "$work/debugfs.commands" "$work/edit-debugfs.raw" >/dev/null 2>&1
    sync "$work/edit-debugfs.raw"
}

edit() {
    local round path answer
    say "edit"
    "$cold_build" build "$dir/inputs/debian.tar.zst" "$work" --size "10 GiB" --keep >/dev/null
    for path in ours mount libext2fs debugfs; do
        cp --sparse=always "$work/golden/disk.raw" "$work/edit-$path.raw"
        chmod 0600 "$work/edit-$path.raw"
    done
    rm --recursive --force "$work/golden"
    sync --file-system "$work"
    echo "new content" >"$work/content"
    { echo "mkdir /root/.ssh"; for path in "${EDITED[@]}"; do printf 'rm /%s\nwrite %s /%s\n' "$path" "$work/content" "$path"; done; } >"$work/debugfs.commands"
    for (( round = 0; round < runs * 2; round++ )); do
        local begun=${EPOCHREALTIME/./} ended
        answer=$("$cold_build" edit "$work/edit-ours.raw")
        ended=${EPOCHREALTIME/./}
        sample edit "11 files, 10 GiB" "cloudletd, as a command" "$(awk -v us=$((ended - begun)) 'BEGIN { printf "%.3f", us / 1000 }')"
        sample edit "11 files, 10 GiB" "cloudletd, compute the patch" "$(jq .edit_ms <<<"$answer")"
        sample edit "11 files, 10 GiB" "cloudletd, compute and write, durable" "$(jq .durable_ms <<<"$answer")"
        timed edit "11 files, 10 GiB" "loop mount + write + umount" edit_by_mount
        edit_by_libext2fs
        timed edit "11 files, 10 GiB" "debugfs -w" edit_by_debugfs
    done
    for path in ours mount libext2fs debugfs; do
        e2fsck -fn "$work/edit-$path.raw" >/dev/null 2>&1 || echo "bench.sh: e2fsck finds faults in the image edited by $path" >&2
        [[ -n $(debugfs -R "cat /etc/hostname" "$work/edit-$path.raw" 2>/dev/null) ]] || echo "bench.sh: $path edited nothing" >&2
        rm --force "$work/edit-$path.raw"
    done
}

# ---- Volumes, and the daemon under load

# shellcheck source=scripts/bench/volumes.sh
. "$here/bench/volumes.sh"
# shellcheck source=scripts/bench/daemon.sh
. "$here/bench/daemon.sh"

inputs
programs
rm --force "$dir/load.jsonl"
load_before=$(cut --delimiter=' ' --fields=1 /proc/loadavg)
for section in "${sections[@]}"; do
    "${section//-/_}"
done
python3 "$here/bench/report.py" "$dir" --load "$load_before" "$(cut --delimiter=' ' --fields=1 /proc/loadavg)" --runs "$runs"
