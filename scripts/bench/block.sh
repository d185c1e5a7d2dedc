#!/bin/bash
# How many 1 MiB direct writes in flight a device needs: the pattern of src/target/bulk.rs (threads that each write the next MiB), made by dd processes
# on disjoint regions of a loop device over a file, against one `dd oflag=direct bs=1M`. Prints the median of the rounds and its ratio to one dd.
#
# usage: scripts/bench/block.sh [MIB] [ROUNDS] [DIRECTORY]     needs root, losetup
set -euo pipefail

mib=${1:-256} rounds=${2:-5} directory=${3:-/var/tmp}
work=$(mktemp --directory --tmpdir="$directory")
device=
cleanup() { [ -z "$device" ] || losetup --detach "$device"; rm -rf "$work"; }
trap cleanup EXIT
head -c "${mib}M" /dev/urandom > "$work/golden"
# Allocated and written, so that no round pays for the filesystem's metadata.
dd if=/dev/zero of="$work/device" bs=1M count="$mib" conv=fsync status=none
device=$(losetup --find --show --direct-io=on "$work/device")

# write DEPTH: seconds that DEPTH writers need for all of it, flush included.
write() {
  local depth=$1 part=$((mib / $1)) begun ended number
  begun=$(date +%s%N)
  for ((number = 0; number < depth; number++)); do
    dd if="$work/golden" of="$device" bs=1M count="$part" skip=$((number * part)) seek=$((number * part)) oflag=direct conv=notrunc status=none &
  done
  wait
  sync "$device"
  ended=$(date +%s%N)
  echo $(((ended - begun) / 1000000))
}

cat "$work/golden" > /dev/null
declare -A times
for ((round = 0; round < rounds; round++)); do
  for depth in 1 2 4 8; do times[$depth]+="$(write "$depth") "; done
done
median() { tr ' ' '\n' <<< "$1" | grep . | sort -n | sed -n "$(((rounds + 1) / 2))p"; }
one=$(median "${times[1]}")
for depth in 1 2 4 8; do
  now=$(median "${times[$depth]}")
  echo "$depth in flight: $now ms, $(awk "BEGIN { printf \"%.2f\", $one / $now }") of one dd"
done
