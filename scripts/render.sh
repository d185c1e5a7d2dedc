#!/usr/bin/env bash
# usage: render.sh REQUEST.json | render.sh --image IMAGE --instance NAME [--pool POOL] [--volume NAME] [--format FORMAT] [--config FILE]
# Renders an instance's volume, waits for it and prints its mapping. REQUEST.json is a StartRenderRequest in JSON.
#   --pool POOL       where the volume goes (default: default)
#   --volume NAME     what it is called there (default: the instance's name)
#   --format FORMAT   raw, qcow2-overlay, qcow2, block or loop
#   --config FILE     the instance's configuration, JSON: {"hostname": ..., "network": ...} or {"args": ..., "dns": ..., "ip": ...}
#   --key KEY         idempotency key (default: a random one, printed); the same key with the same request is the same render
#   --size SIZE       virtual size of the root in bytes, or with K, M, G, T (default: the golden's)
#   --device SPEC     a further device, ROLE:SIZE[:MOUNT], e.g. data:20G:/srv, swap:2G, scratch:10G:/tmp; may be repeated
#   --persistent SIZE a data device of this size for what is at the manifest's persistent paths
#   --replace         a root of this name that the instance has already is replaced; identity and data stay
#   --overwrite       signatures found on a block device may be overwritten
#   --no-wait         print the render's id and leave
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=scripts/lib.sh
source "$here/lib.sh"

file="" image="" instance="" pool=default volume="" format=unspecified config="" overwrite=false wait=yes key="" size=0 replace=false devices="[]"

while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --image | --instance | --pool | --volume | --format | --config | --key) declare "${1#--}=${2:?}"; shift ;;
        --size) size=$(bytes "${2:?}"); shift ;;
        --device) devices=$(with_device "$devices" "${2:?}" false); shift ;;
        --persistent) devices=$(with_device "$devices" "data:${2:?}" true); shift ;;
        --replace) replace=true ;;
        --overwrite) overwrite=true ;;
        --no-wait) wait=no ;;
        -*) die "unknown argument $1 (see --help)" ;;
        *) file=$1 ;;
    esac
    shift
done
if [[ -n $file ]]; then
    request=$(<"$file")
else
    [[ -n $image && -n $instance ]] || die "--image and --instance are needed (see --help)"
    format=${format^^}
    request=$(jq --null-input --arg image "$image" --arg instance "$instance" --arg pool "$pool" --arg volume "${volume:-$instance}" \
        --arg format "VOLUME_FORMAT_${format//-/_}" --rawfile config "${config:-/dev/null}" --argjson overwrite "$overwrite" \
        --arg size "$size" --argjson replace "$replace" --argjson devices "$devices" \
        '{spec: {imageId: $image, instance: ({name: $instance} + if $config == "" then {} else {configJson: $config} end),
                 volume: {pool: $pool, name: $volume}, format: $format, overwrite: $overwrite, sizeBytes: $size, replace: $replace, devices: $devices}}')
fi
key=${key:-$(jq --raw-output '.idempotencyKey // ""' <<<"$request")}
key=${key:-$(</proc/sys/kernel/random/uuid)}
echo "idempotency key: $key" >&2
id=$(jq --arg key "$key" '.idempotencyKey = $key' <<<"$request" | call RenderService/StartRender | jq --raw-output .render.id)
[[ $wait == yes ]] || { echo "$id"; exit; }
"$here/watch.sh" "$id"
"$here/mapping.sh" --render "$id"
