#!/usr/bin/env bash
# usage: delete-volume.sh POOL/VOLUME...
# Removes volumes: files are unlinked, loop devices detached, block devices made unbootable. Success when one is gone already.
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ $# -gt 0 ]] || die "no volume given (see --help)"
for argument in "$@"; do
    case "$argument" in
        --help) help ;;
        -*) die "unknown argument $argument (see --help)" ;;
    esac
done

for volume in "$@"; do
    reply=$(volume_ref "$volume" | jq '{volume: .}' | call VolumeService/DeleteVolume)
    jq --raw-output --arg volume "$volume" '"\($volume)  \(if .deleted then "deleted" else "was gone already" end)"' <<<"$reply"
done
