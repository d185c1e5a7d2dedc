#!/usr/bin/env bash
# usage: reap.sh [--remove [--volumes]]
# Lists what older versions, crashes or operators left in pools, store and loop devices, and why each is taken for what it is.
#   --remove     remove what is proven to be the daemon's
#   --volumes    also volumes that the daemon made and its catalogue does not know (after an old catalogue was put back they are all that is left)
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dry_run=true volumes=false
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --remove) dry_run=false ;;
        --volumes) volumes=true ;;
        *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done
jq --null-input --argjson dry_run $dry_run --argjson volumes $volumes '{dryRun: $dry_run, volumes: $volumes}' | call StoreService/ReapLeftovers |
    jq --raw-output "$JQ_SIZE"'.leftovers[]? | [.kind, .path, (.sizeBytes | size), .why, if .removed then "goes" else "stays: \(.keptBecause)" end] | @tsv' |
    table KIND PATH SIZE WHY WHAT
