#!/usr/bin/env bash
# usage: reconfigure.sh POOL/VOLUME --instance NAME --config FILE [--dry-run] [--fresh-host-keys] [--expand-templates]
# Changes the configuration of a stopped instance on its root volume, in place: new addresses, keys, host name, files. What FILE does not give stays.
#   --instance NAME      the instance's name, as it was rendered (default: the volume's name)
#   --config FILE        the configuration, JSON: {"hostname": ..., "network": ...} or {"args": ..., "dns": ..., "ip": ...}
#   --dry-run            check everything, show what would change, write nothing
#   --fresh-host-keys    new SSH host keys (default: it keeps those it has)
#   --expand-templates   expand the manifest's templates again, with the args in FILE
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

volume="" instance="" config="" dry=false fresh=false templates=false
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --instance | --config) declare "${1#--}=${2:?}"; shift ;;
        --dry-run) dry=true ;;
        --fresh-host-keys) fresh=true ;;
        --expand-templates) templates=true ;;
        -*) die "unknown argument $1 (see --help)" ;;
        *) volume=$1 ;;
    esac
    shift
done
[[ -n $volume && -n $config ]] || die "a volume and --config are needed (see --help)"
[[ -r $config ]] || die "$config can't be read"

reply=$(volume_ref "$volume" | jq --arg instance "${instance:-${volume#*/}}" --rawfile config "$config" \
    --argjson dry "$dry" --argjson fresh "$fresh" --argjson templates "$templates" \
    '{volume: ., instance: {name: $instance, configJson: $config}, dryRun: $dry, freshHostKeys: $fresh, expandTemplates: $templates}' |
    call VolumeService/ReconfigureVolume)
jq --raw-output --arg volume "$volume" --argjson dry "$dry" "$JQ_SIZE"'
    "\($volume)  \(if $dry then "would change" else "reconfigured" end)  \(.patchBlocks) blocks, \(.writtenBytes | size) written",
    "  host name \(.mapping.identity.hostname)  machine-id \(.mapping.identity.machineId)",
    (.edits[] | "  \(.verb)  \(.path)  \(.why)"),
    (.injectedJson | fromjson | (.warnings[]? | "  warning: \(.)"), (.notes[]? | "  note: \(.)"))' <<<"$reply"
