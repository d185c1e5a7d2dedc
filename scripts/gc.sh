#!/usr/bin/env bash
# usage: gc.sh [--dry-run] [--max SIZE | --free SIZE] [--min-age SECONDS] [--json]
#        gc.sh --lease OBJECT OWNER REASON [SECONDS]
#        gc.sh --release LEASE
#        gc.sh --leases
# Removes golden images and tarballs that nobody needs, the longest unused first, and says why the rest stays. Without --max or --free as much as the configured
# budget ([gc] max_size) says.
#   --dry-run        only say what would go
#   --max SIZE       until they use this much at most; 0 for everything that may go (K, M, G, T are units)
#   --free SIZE      until this much is freed
#   --min-age S      seconds since the last use before anything may go (default: gc.min_age_secs)
#   --json           the answer as it is
#   --lease          hold an image (img-…), a golden image (its key) or a tarball (sha256:…), perhaps for so many seconds; prints the lease's id
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

request='{}' json=no
field() { # NAME VALUE
    request=$(jq --compact-output --arg name "$1" --argjson value "$2" '.[$name] = $value' <<<"$request")
}
case "${1:-}" in
    --lease)
        case "${2:?}" in img-*) name=imageId ;; sha256:*) name=blobDigest ;; *) name=goldenKey ;; esac
        jq --null-input --arg name "$name" --arg object "$2" --arg owner "${3:?}" --arg reason "${4:?}" --arg ttl "${5:-0}" \
            '{($name): $object, owner: $owner, reason: $reason, ttlSeconds: $ttl}' | call StoreService/CreateLease | jq --raw-output .lease.id
        exit ;;
    --release)
        jq --null-input --arg id "${2:?}" '{leaseId: $id}' | call StoreService/ReleaseLease | jq --exit-status .released >/dev/null || die "there is no lease $2"
        exit ;;
    --leases)
        call StoreService/ListLeases <<<'{}' | jq --raw-output '.leases[]? | [.id, .imageId // .goldenKey // .blobDigest, .owner, .reason, .expiresAt // "never"] | @tsv' |
            table LEASE OBJECT OWNER REASON ENDS
        exit ;;
esac
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --dry-run) field dryRun true ;;
        --max) field usedBytesMax "$(bytes "${2:?}")"; shift ;;
        --free) field freeBytes "$(bytes "${2:?}")"; shift ;;
        --min-age) field minAgeSeconds "${2:?}"; shift ;;
        --json) json=yes ;;
        *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done

reply=$(call StoreService/CollectGarbage <<<"$request")
[[ $json == no ]] || { echo "$reply"; exit; }
jq --raw-output "$JQ_SIZE"'.objects[]? | [.kind, .name, (.sizeBytes | size), .lastUsedAt, if .removed then "goes" else "stays: \(.explanation)" end] | @tsv' <<<"$reply" |
    table KIND NAME SIZE "LAST USED" WHAT
jq --raw-output "$JQ_SIZE"'"\(.freedBytes | size) of \(.usedBytes | size)"' <<<"$reply"
