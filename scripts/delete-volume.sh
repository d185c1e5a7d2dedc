#!/usr/bin/env bash
# usage: delete-volume.sh [--data] POOL/VOLUME...
# Removes volumes: files are unlinked, loop devices detached, block devices made unbootable. Success when one is gone already. A root takes its swap and
# scratch volumes with it.
#   --data   its data volumes too
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

data=false volumes=()
for argument in "$@"; do
    case "$argument" in
        --help) help ;;
        --data) data=true ;;
        -*) die "unknown argument $argument (see --help)" ;;
        *) volumes+=("$argument") ;;
    esac
done
[[ ${#volumes[@]} -gt 0 ]] || die "no volume given (see --help)"

for volume in "${volumes[@]}"; do
    reply=$(volume_ref "$volume" | jq --argjson data "$data" '{volume: ., deleteData: $data}' | call VolumeService/DeleteVolume)
    jq --raw-output --arg volume "$volume" '"\($volume)  \(if .deleted then "deleted" else "was gone already" end)"' <<<"$reply"
done
