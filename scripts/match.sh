#!/usr/bin/env bash
# usage: match.sh [--image REFERENCE] [--platform NAME]... [--platforms FILE] [--containers lxc,kvm,xen] [--json]
# Says which platforms an image boots on, which kinds of guests can be created inside, and why not otherwise.
#   --image       an image id, NAME, NAME@VERSION, NAME:CHANNEL, or a product of a stream (com.ubuntu.cloud:server:12.04:amd64); default: every named image
#   --platform    only this platform; may be given several times
#   --platforms   a document of instance types (proto/platforms.schema.json) in the place of the host's
#   --containers  kinds of guests that are wanted; the exit status is 3 when no platform has them all
#   --json        one JSON object per image and platform
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

json=no image="" document="" containers='[]' platforms='[]'
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --json) json=yes; shift; continue ;;
        --image | --platform | --platforms | --containers) [[ $# -ge 2 ]] || die "$1 needs a value (see --help)" ;;
        *) die "unknown argument $1 (see --help)" ;;
    esac
    case "$1" in
        --image) image=$2 ;;
        --platform) platforms=$(jq --compact-output --arg name "$2" '. + [$name]' <<<"$platforms") ;;
        --platforms) document=$(<"$2") ;;
        --containers) containers=$(jq --null-input --compact-output --arg kinds "${2^^}" '$kinds | split(",") | map("CONTAINER_KIND_" + .)') ;;
    esac
    shift 2
done

matches=$(jq --null-input --arg image "$image" --arg document "$document" --argjson containers "$containers" --argjson platforms "$platforms" \
    '{image: $image, platforms: $platforms, platformsJson: $document, containers: $containers}' | call CatalogueService/Match)
if [[ $json == yes ]]; then
    jq --compact-output '.matches[]?' <<<"$matches"
else
    # shellcheck disable=SC2016
    jq --raw-output 'def kind: sub("CONTAINER_KIND_"; "") | ascii_downcase;
        .matches[]? | [.image, .platform, (if .boots then "boots" else "no" end),
            ([.containers[]? | select(.possible) | .kind | kind] | join(",") | if . == "" then "-" else . end),
            ([.bootReasons[]?.code] + [if .boots then .containers[]? | select(.possible | not) | (.kind | kind) + ": " + .reasons[0].code else empty end]
                | join(", "))] | @tsv' <<<"$matches" | table IMAGE PLATFORM BOOTS GUESTS "WHY NOT"
fi
jq --exit-status 'any(.matches[]?; .matches)' <<<"$matches" >/dev/null || exit 3
