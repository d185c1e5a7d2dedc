#!/usr/bin/env bash
# usage: list-images.sh [--json]
# Lists the catalogued images, newest first.
#   --json   one JSON object per image
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

json=no
for argument in "$@"; do
    case "$argument" in
        --help) help ;;
        --json) json=yes ;;
        *) die "unknown argument $argument (see --help)" ;;
    esac
done

images=$(pages ImageService/ListImages images '{}')
if [[ $json == yes ]]; then
    echo "$images"
    exit
fi
jq --raw-output "$JQ_SIZE"'[.id, .name, .arch, (.rootfs.sizeBytes | size), (if .rootfs.cached then "cached" else "remote" end), .createdAt] | @tsv' <<<"$images" |
    table IMAGE NAME ARCH ROOTFS HERE CREATED
