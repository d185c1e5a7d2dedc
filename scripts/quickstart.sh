#!/usr/bin/env bash
# usage: quickstart.sh [--boot] [--output DIRECTORY]
# From a fresh checkout on Debian to two rendered instances: installs what is needed, builds the daemon, makes a Debian root filesystem with
# a kernel, starts a private daemon, creates an image, and renders web-1 (qcow2, backed by the golden image) and web-2 (raw file) with
# addresses of their own. Needs root.
#   --boot               boots web-1 in QEMU (software emulation) and shows what the guest says about itself
#   --output DIRECTORY   where the daemon's state and the volumes go (default target/quickstart; emptied first)
# The daemon is stopped at the end; the volumes stay.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
PATH=$PATH:/usr/sbin:/sbin

boot=no output=$root/target/quickstart
while [[ $# -gt 0 ]]; do
    case "$1" in
        --boot) boot=yes ;;
        --output) output=${2:?}; shift ;;
        --help) sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done
[[ $EUID -eq 0 ]] || { echo "quickstart.sh: root is needed (mmdebstrap, loop devices)" >&2; exit 1; }

say() {
    printf '\n== %s\n' "$*"
}

say "Packages and tools"
"$here/setup-debian.sh" --test
"$here/tools.sh" grpcurl
say "Build"
cargo build --locked --release --manifest-path "$root/Cargo.toml"
cloudletd=${CARGO_TARGET_DIR:-$root/target}/release/cloudletd
say "Debian root filesystem"
"$here/fixtures.sh" bookworm-ifupdown
fixtures=$(realpath "${CLOUDLETD_FIXTURES:-$root/target/fixtures}")

say "Daemon"
# Only a directory that an earlier run made is emptied.
if [[ -e $output && ! -e $output/.quickstart && -n $(ls --almost-all "$output") ]]; then
    echo "quickstart.sh: $output is not empty and not from an earlier run" >&2
    exit 1
fi
rm --recursive --force "$output"
mkdir --parents "$output/volumes"
output=$(realpath "$output")
touch "$output/.quickstart"
cat >"$output/cloudletd.toml" <<TOML
state_dir = "$output/state"
[listen]
unix = "$output/cloudletd.sock"
[fetch]
file_roots = ["$fixtures"]
[[pool]]
name = "default"
kind = "directory"
path = "$output/volumes"
TOML
"$cloudletd" config check "$output/cloudletd.toml"
"$cloudletd" serve --config "$output/cloudletd.toml" 2>"$output/cloudletd.log" &
daemon=$!
stop() {
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
}
trap stop EXIT
export CLOUDLETD_ADDR=unix://$output/cloudletd.sock
for (( tries = 0; ; tries++ )); do
    [[ ! -S $output/cloudletd.sock ]] || break
    if ! kill -0 "$daemon" 2>/dev/null || (( tries == 100 )); then
        cat "$output/cloudletd.log" >&2
        exit 1
    fi
    sleep 0.1
done
"$here/host-info.sh"

say "Image"
digest=$(sha256sum "$fixtures/bookworm-ifupdown.tar.zst")
jq --null-input --arg url "file://$fixtures/bookworm-ifupdown.tar.zst" --arg digest "sha256:${digest%% *}" \
    '{name: "debian-12", description: "Debian bookworm with a kernel", author: "quickstart", arch: "x86_64",
      entry_points: {kernel: {os: "linux"}}, rootfs: {url: $url, digest: $digest}}' >"$output/manifest.json"
image=$("$here/create-image.sh" "$output/manifest.json" --json | jq --raw-output .image.id)
"$here/list-images.sh"

instance() { # NAME LAST-BYTE: the configuration of one instance
    jq --null-input --arg name "$1" --arg n "$2" '{hostname: "\($name).example.com", network: {nameservers: ["192.0.2.53", "2001:db8::53"], search: ["example.com"],
        interfaces: [{name: "eth0", mac: "52:54:00:00:00:\($n)", addresses: ["192.0.2.\($n)/24", "2001:db8::\($n)/64"], gateway4: "192.0.2.1", gateway6: "2001:db8::1"}]}}' \
        >"$output/$1.json"
}
render() { # NAME FORMAT
    say "Instance $1, $2"
    "$here/render.sh" --image "$image" --instance "$1" --format "$2" --config "$output/$1.json"
}
instance web-1 11
instance web-2 12
render web-1 qcow2-overlay
render web-2 raw
say "Volumes"
"$here/list-volumes.sh"
say "web-1 for libvirt, xl and QEMU"
for dialect in libvirt xl qemu; do
    "$here/mapping.sh" default/web-1 --dialect "$dialect"
done

if [[ $boot == yes ]]; then
    say "web-1 boots"
    parts=$fixtures/bookworm-ifupdown
    # The disk as the mapping describes it, on a throw-away overlay: -snapshot leaves the volume as it was rendered.
    mapfile -t disk < <("$here/mapping.sh" default/web-1 --dialect qemu | xargs --max-args=1)
    uuid=$("$here/mapping.sh" default/web-1 --dialect json | jq --raw-output '.devices[0].filesystem.uuid')
    # A second disk is a shell script that is init for a moment: it adds a unit below /run, which prints and powers off, and starts systemd.
    printf '%s\n' 'mkdir -p /run/systemd/system/multi-user.target.wants' \
        'printf "%s\n" "[Unit]" "DefaultDependencies=no" "Wants=network-online.target" "After=multi-user.target network-online.target" \
            "[Service]" "Type=oneshot" "ExecStart=/bin/sh /run/show" >/run/systemd/system/show.service' \
        'ln -s ../show.service /run/systemd/system/multi-user.target.wants/' \
        'echo "(hostname; cat /etc/machine-id; ip -brief address; ip route; ip -6 route; cat /etc/resolv.conf) >/dev/ttyS0; sleep 2; systemctl poweroff -ff" >/run/show' \
        'exec /sbin/init' >"$output/show"
    truncate --size=%4096 "$output/show"
    timeout 300 qemu-system-x86_64 -accel tcg -cpu Nehalem,-cx16 -m 768 -nodefaults -no-reboot -display none -snapshot -serial stdio \
        -kernel "$parts/vmlinuz" -initrd "$parts/initrd.img" "${disk[@]}" \
        -drive "if=none,id=show,file=$output/show,format=raw" -device virtio-blk-pci,drive=show,serial=show \
        -netdev hubport,id=net0,hubid=0 -device virtio-net-pci,netdev=net0,mac=52:54:00:00:00:11,romfile= \
        -append "root=UUID=$uuid rw console=ttyS0 mitigations=off net.ifnames=0 quiet systemd.show_status=no init=/bin/sh -- /dev/disk/by-id/virtio-show" </dev/null
fi
say "Done: volumes in $output/volumes, daemon stopped"
