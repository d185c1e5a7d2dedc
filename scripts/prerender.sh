#!/usr/bin/env bash
# usage: prerender.sh IMAGE [--filesystem ext4|xfs|btrfs] [--layout bare|gpt] [--size BYTES] [--profile NAME] [--no-wait]
# Builds the golden image of an image ahead of time, and waits for it.
#   --size BYTES     size of the golden disk, a multiple of 4096
#   --profile NAME   ext4 features: modern, grub206 or compat
#   --no-wait        print the render's id and leave
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

image="" golden='{}' wait=yes
set_golden() { # FIELD VALUE
    golden=$(jq --compact-output --arg field "$1" --arg value "$2" '.[$field] = $value' <<<"$golden")
}
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --filesystem) set_golden filesystem "${2:?}"; shift ;;
        --layout) layout=${2:?}; set_golden layout "DISK_LAYOUT_${layout^^}"; shift ;;
        --size) set_golden sizeBytes "${2:?}"; shift ;;
        --profile) set_golden profile "${2:?}"; shift ;;
        --no-wait) wait=no ;;
        -*) die "unknown argument $1 (see --help)" ;;
        *) image=$1 ;;
    esac
    shift
done
[[ -n $image ]] || die "no image given (see --help)"

reply=$(jq --null-input --arg image "$image" --argjson golden "$golden" '{imageId: $image, golden: $golden}' | call RenderService/Prerender)
if [[ $(jq .alreadyBuilt <<<"$reply") == true ]]; then
    jq --raw-output '"golden \(.render.goldenKey) was there already"' <<<"$reply"
elif [[ $wait == no ]]; then
    jq --raw-output .render.id <<<"$reply"
else
    exec "$(dirname "${BASH_SOURCE[0]}")/watch.sh" "$(jq --raw-output .render.id <<<"$reply")"
fi
