#!/usr/bin/env bash
# usage: create-image.sh MANIFEST [--rootfs-url URL | --rootfs-digest DIGEST | --upload FILE] [--signature FILE] [--upload-signature FILE] [--json]
# Catalogues a manifest (a JSON file) and prints the image.
#   --rootfs-url URL          where the root filesystem is, when the manifest does not say
#   --rootfs-digest DIGEST    sha256:... of a root filesystem uploaded before
#   --upload FILE             upload this root filesystem tarball first (small ones: through JSON it is slow)
#   --signature FILE          detached signature of the manifest (gpg or minisign)
#   --upload-signature FILE   detached signature of what is uploaded
#   --json                    the whole answer
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

manifest="" url="" digest="" upload="" json=no signature="" upload_signature=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --rootfs-url) url=${2:?}; shift ;;
        --rootfs-digest) digest=${2:?}; shift ;;
        --upload) upload=${2:?}; shift ;;
        --signature) signature=$(base64 --wrap=0 -- "${2:?}"); shift ;;
        --upload-signature) upload_signature=$(base64 --wrap=0 -- "${2:?}"); shift ;;
        --json) json=yes ;;
        -*) die "unknown argument $1 (see --help)" ;;
        *) manifest=$1 ;;
    esac
    shift
done
[[ -n $manifest ]] || die "no manifest given (see --help)"

if [[ -n $upload ]]; then
    sum=$(sha256sum -- "$upload")
    # shellcheck disable=SC2016 # Expanded by the shell that split starts for each chunk.
    digest=$({
        echo "{\"header\": {\"digest\": \"sha256:${sum%% *}\", \"sizeBytes\": $(stat --format=%s -- "$upload"), \"signature\": \"$upload_signature\"}}"
        split --bytes=2M --filter='echo "{\"chunk\": \"$(base64 --wrap=0)\"}"' -- "$upload"
    } | call ImageService/UploadRootfs | jq --raw-output .rootfs.digest)
fi
reply=$(jq --null-input --rawfile manifest "$manifest" --arg url "$url" --arg digest "$digest" --arg signature "$signature" \
    '{manifestJson: $manifest, rootfsUrl: $url, rootfsDigest: $digest, manifestSignature: $signature}' | call ImageService/CreateImage)
if [[ $json == yes ]]; then
    echo "$reply"
else
    jq --raw-output '"\(.image.id)  \(.image.name)  \(if .created then "created" else "was there already" end)"' <<<"$reply"
fi
