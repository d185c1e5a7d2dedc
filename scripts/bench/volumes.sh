# shellcheck shell=bash disable=SC2154 # variables are those of bench.sh
# Part of scripts/bench.sh: warm renders to each target, beside what operators do by hand.

peer_overlay() { qemu-img create -q -f qcow2 -F raw -b "$golden" "$1"; sync "$1" "$(dirname "$1")"; }
peer_copy() { cp --sparse=always "$golden" "$1"; sync "$1" "$(dirname "$1")"; }
peer_reflink() { cp --reflink=always "$golden" "$1"; sync "$1" "$(dirname "$1")"; }
peer_convert() { qemu-img convert -f raw -O qcow2 "$golden" "$1"; sync "$1" "$(dirname "$1")"; }

# An overlay and a seed volume that the guest's cloud-init reads, some time after it has booted.
peer_seed() {
    printf 'instance-id: peer\nlocal-hostname: peer\n' >"$work/meta-data"
    printf '#cloud-config\nssh_authorized_keys: ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti"]\n' >"$work/user-data"
    printf 'version: 2\nethernets: {eth0: {addresses: [10.0.0.2/16], gateway4: 10.0.255.254}}\n' >"$work/network-config"
    qemu-img create -q -f qcow2 -F raw -b "$golden" "$1"
    cloud-localds --network-config="$work/network-config" "$1.seed" "$work/user-data" "$work/meta-data"
    sync "$1" "$1.seed" "$(dirname "$1")"
}

# What a shell script does that wants the configuration inside: the whole instance, by the kernel's mount.
peer_copy_mount() { peer_copy_edit --sparse=always "$1"; }
peer_reflink_mount() { peer_copy_edit --reflink=always "$1"; }
peer_copy_edit() { # HOW FILE
    local path
    cp "$1" "$golden" "$2"
    chmod 0600 "$2"
    mount -o loop "$2" "$work/mnt"
    mkdir --parents "$work/mnt/root/.ssh"
    for path in "${EDITED[@]}"; do
        printf 'new content of %s\n' "$path" >"$work/mnt/$path"
    done
    umount "$work/mnt"
    sync "$2" "$(dirname "$2")"
}

warm_case() { # CASE FORMAT COUNT [PEER-NAME PEER-FUNCTION]...
    local round number time case=$1 format=$2 count=$3
    local -a peers=("${@:4}")
    say "warm: $case"
    for (( round = 0; round < runs; round++ )); do
        for time in $(client render "$image" --format "$format" --count "$count" | jq '.times_ms[]'); do
            sample warm "$case" cloudletd "$time"
        done
        for (( peer = 0; peer < ${#peers[@]}; peer += 2 )); do
            for (( number = 0; number < count; number++ )); do
                timed warm "$case" "${peers[peer]}" "${peers[peer + 1]}" "$pool/peer"
                rm --force "$pool/peer" "$pool/peer.seed"
            done
        done
    done
}

ready_image() { # sets image and golden
    local answer
    answer=$(client image "$dir/inputs/debian.tar.zst")
    image=$(jq --raw-output .image <<<"$answer") golden=$(jq --raw-output .golden <<<"$answer")
}

warm() {
    local image golden pool peer
    start_daemon "$work/state" "$work/volumes"
    pool=$work/volumes
    ready_image
    client render "$image" --count 20 >/dev/null
    warm_case "qcow2 overlay" qcow2-overlay 40 "qemu-img create -b" peer_overlay "qemu-img create -b + cloud-localds" peer_seed
    warm_case "raw, $(findmnt --noheadings --output FSTYPE --target "$pool") directory" raw 3 "cp --sparse" peer_copy "cp --sparse + mount + write" peer_copy_mount
    warm_case "standalone qcow2" qcow2 3 "qemu-img convert" peer_convert
    stop_daemon
    truncate --size=16G "$work/xfs.img"
    mkfs.xfs -q -m reflink=1 "$work/xfs.img"
    mount -o loop "$work/xfs.img" "$work/xfs"
    mkdir "$work/xfs/volumes"
    start_daemon "$work/xfs/state" "$work/xfs/volumes"
    pool=$work/xfs/volumes
    ready_image
    warm_case "raw, XFS with reflinks" raw 20 "cp --reflink" peer_reflink "cp --reflink + mount + write" peer_reflink_mount
    stop_daemon
    umount "$work/xfs"
    rm --force "$work/xfs.img"
}

# ---- Block volumes

# The golden's allocated bytes one after another in a file: what dd has to write.
pack() { # GOLDEN
    python3 - "$1" "$work/packed" <<'PY'
import os, sys
source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
end, at = os.fstat(source).st_size, 0
while at < end:
    try:
        at = os.lseek(source, at, os.SEEK_DATA)
    except OSError:
        break
    hole = os.lseek(source, at, os.SEEK_HOLE)
    while at < hole:
        at += os.write(target, os.pread(source, min(hole - at, 1 << 22), at))
PY
}

dd_direct() { dd if="$work/packed" of="$device" bs=1M oflag=direct conv=notrunc status=none; sync "$device"; }
dd_direct_zeroed() { blkdiscard --zeroout "$device"; dd_direct; }

# A device whose every block is written beforehand, so that nobody pays for the filesystem below it.
block() {
    local image golden round bytes
    say "block"
    dd if=/dev/zero of="$work/device" bs=4M count=1024 oflag=direct conv=fsync status=none
    device=$(losetup --find --show --direct-io=on "$work/device")
    mkdir --parents "$work/devices"
    ln --symbolic --force "$device" "$work/devices/bench"
    start_daemon "$work/state" "$work/volumes" "[[pool]]
name = \"devices\"
kind = \"devices\"
path = \"$work/devices\"
allow = [\"bench\"]"
    ready_image
    pack "$golden"
    bytes=$(stat --format=%s "$work/packed")
    cat "$work/packed" >/dev/null
    for (( round = 0; round < runs; round++ )); do
        block_round "block volume, only data written ($((bytes >> 20)) MiB)" keep "dd oflag=direct of as many bytes" dd_direct
        block_round "block volume, the rest zeroed (4 GiB)" zero-out "blkdiscard --zeroout + dd oflag=direct" dd_direct_zeroed
    done
    stop_daemon
    losetup --detach "$device"
    device=
    rm --recursive --force "$work/device" "$work/packed" "$work/devices"
}

block_round() { # CASE ZERO-POLICY PEER-NAME PEER-FUNCTION
    sample block "$1" cloudletd "$(client render "$image" --format block --pool devices --volume bench --overwrite --zero "$2" --count 1 | jq '.times_ms[0]')"
    timed block "$1" "$3" "$4"
}

# ---- Appliances

customize() { LIBGUESTFS_BACKEND=direct "$@" >/dev/null 2>&1; }

by_guestfish() {
    peer_overlay "$pool/peer"
    local path
    for path in "${EDITED[@]}"; do printf 'upload %s /%s\n' "$work/content" "$path"; done |
        customize guestfish --rw --format=qcow2 --add "$pool/peer" --mount /dev/sda
    sync "$pool/peer"
}

by_virt_customize() {
    local path
    local -a uploads=()
    peer_overlay "$pool/peer"
    for path in "${EDITED[@]}"; do uploads+=(--upload "$work/content:/$path"); done
    customize virt-customize --no-network --format qcow2 --add "$pool/peer" --hostname peer "${uploads[@]}"
    sync "$pool/peer"
}

# The same eleven files in an overlay, by the tools that boot a small machine for it. Once each: they take seconds where KVM works, and the results say when
# it does not and the machine is emulated.
appliance() {
    local image golden pool=$work/volumes kind=KVM
    say "appliance"
    if ! customize timeout 120 guestfish --ro --add /dev/null run; then
        export LIBGUESTFS_BACKEND_SETTINGS=force_tcg
        kind="emulated, no KVM"
        customize guestfish --ro --add /dev/null run || { echo "bench.sh: guestfish can't start its appliance (libguestfs-test-tool says why)" >&2; exit 1; }
    fi
    start_daemon "$work/state" "$work/volumes"
    ready_image
    echo "new content" >"$work/content"
    sample appliance "qcow2 overlay, files inside" cloudletd "$(client render "$image" --count 20 | jq .p50_ms)"
    timed appliance "qcow2 overlay, files inside" "guestfish ($kind)" by_guestfish
    rm --force "$pool/peer"
    timed appliance "qcow2 overlay, files inside" "virt-customize ($kind)" by_virt_customize
    rm --force "$pool/peer"
    stop_daemon
}
