#!/usr/bin/env bash
# usage: mapping.sh POOL/VOLUME | --render RENDER [--dialect DIALECT] [--bus xen|virtio|scsi]
# Prints the block-device mapping of the instance that a volume was made for.
#   --dialect DIALECT   summary (default), libvirt, xl, qemu, ec2, or json (everything the daemon keeps)
#   --bus BUS           bus the dialects are written for (default virtio)
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

request='{}' dialect=summary
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --render) request=$(jq --arg id "${2:?}" '.renderId = $id' <<<"$request"); shift ;;
        --dialect) dialect=${2:?}; shift ;;
        --bus) request=$(jq --arg bus "${2:?}" '.bus = $bus' <<<"$request"); shift ;;
        -*) die "unknown argument $1 (see --help)" ;;
        *) request=$(jq --argjson volume "$(volume_ref "$1")" '.volume = $volume' <<<"$request") ;;
    esac
    shift
done

case "$dialect" in
    libvirt) filter=.libvirtXml ;;
    xl) filter='.xlDisks[]' ;;
    # One argument per line, quoted for a shell.
    qemu) filter='.qemuArgs[] | @sh' ;;
    ec2) filter='.ec2Json | fromjson' ;;
    json) filter='.mappingJson | fromjson' ;;
    summary) filter="$JQ_SIZE"'.mapping | "instance \(.instance)  image \(.imageId)  render \(.renderId)",
        "  host name \(.identity.hostname)  machine-id \(.identity.machineId)",
        (.devices[] | "  \(.role | ltrimstr("DEVICE_ROLE_") | ascii_downcase)  \(.xenName) \(.virtioName) \(.scsiName)  \(.volume.device)  \(.format)  \(.volume.virtualSizeBytes | size), \(.volume.allocatedSizeBytes | size) allocated",
            (.backingChain[]? | "    on \(.path) (\(.format))"),
            (.partitions[]? | "    partition \(.number)  \(.name)  at \(.offsetBytes), \(.sizeBytes | size)"),
            (.filesystem // empty | "    \(.type) \(.uuid) \(.label)"),
            (.goldenDigest // "" | select(. != "") | "    golden \(.)"))' ;;
    *) die "unknown dialect $dialect (see --help)" ;;
esac
call VolumeService/GetMapping <<<"$request" | jq --raw-output "$filter"
