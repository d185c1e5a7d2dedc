#!/usr/bin/env bash
# usage: list-volumes.sh [--pool POOL] [--json]
# Lists the volumes this daemon made, newest first.
#   --pool POOL   only those of this pool
#   --json        one JSON object per volume
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

pool="" json=no
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --pool) pool=${2:?}; shift ;;
        --json) json=yes ;;
        *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done

volumes=$(pages VolumeService/ListVolumes volumes "$(jq --null-input --arg pool "$pool" '{pool: $pool}')")
if [[ $json == yes ]]; then
    echo "$volumes"
    exit
fi
jq --raw-output "$JQ_SIZE"'["\(.ref.pool)/\(.ref.name)", .instance, (.role | ltrimstr("DEVICE_ROLE_") | ascii_downcase), (.format | ltrimstr("VOLUME_FORMAT_") | ascii_downcase), (.virtualSizeBytes | size),
    (.allocatedSizeBytes | size), .device, .createdAt] | @tsv' <<<"$volumes" | table VOLUME INSTANCE ROLE FORMAT SIZE ALLOCATED DEVICE CREATED
