# shellcheck shell=bash
# What the operator scripts share; sourced, not run. They need grpcurl and jq, and ask the daemon by reflection: no proto files.
#
# CLOUDLETD_ADDR   unix:///PATH (default unix:///run/cloudletd/cloudletd.sock), http://HOST:PORT, or https://HOST:PORT with
#                  CLOUDLETD_CACERT, CLOUDLETD_CERT and CLOUDLETD_KEY (PEM files)
# GRPCURL          the program (default: grpcurl in PATH, or the one scripts/tools.sh built)

: "${CLOUDLETD_ADDR:=unix:///run/cloudletd/cloudletd.sock}"
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/../target/tools/bin
# Bytes for people; an argument for jq programs.
export JQ_SIZE='def size: tonumber | if . >= 1073741824 then "\(. * 10 / 1073741824 | round / 10) GiB"
    elif . >= 1048576 then "\(. * 10 / 1048576 | round / 10) MiB" else "\(.) B" end;'

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# The comment at the head of the script that runs is its help.
help() {
    sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"
    exit 0
}

# call METHOD: one call of cloudlet.v1.METHOD with the JSON request (or, for client streams, requests) on standard input.
call() {
    local program address flags=()
    program=${GRPCURL:-$(command -v grpcurl || echo "$tools/grpcurl")}
    [[ -x $program || -n ${GRPCURL:-} ]] || die "grpcurl is not installed (scripts/tools.sh builds one)"
    case "$CLOUDLETD_ADDR" in
        unix:*) flags=(--plaintext --unix); address=${CLOUDLETD_ADDR#unix:}; address=${address#//} ;;
        http://*) flags=(--plaintext); address=${CLOUDLETD_ADDR#http://} ;;
        https://*) flags=(--cacert "${CLOUDLETD_CACERT:?}" --cert "${CLOUDLETD_CERT:?}" --key "${CLOUDLETD_KEY:?}"); address=${CLOUDLETD_ADDR#https://} ;;
        *) die "CLOUDLETD_ADDR is $CLOUDLETD_ADDR; it starts with unix:, http:// or https://" ;;
    esac
    "$program" "${flags[@]}" --emit-defaults -d @ "$address" "cloudlet.v1.$1"
}

# pages METHOD FIELD REQUEST: every element of a list that comes in pages, as a JSON stream.
pages() {
    local reply token=""
    while :; do
        reply=$(jq --compact-output --arg token "$token" '. + {pageToken: $token}' <<<"$3" | call "$1")
        jq --compact-output --arg field "$2" '.[$field][]?' <<<"$reply"
        token=$(jq --raw-output '.nextPageToken // ""' <<<"$reply")
        [[ -n $token ]] || break
    done
}

# table HEADER...: aligns tab-separated lines from standard input below a header. Nothing but the header means there was nothing.
table() {
    { (IFS=$'\t'; echo "$*"); cat; } | column --table --separator $'\t'
}

# volume_ref POOL/NAME: the JSON of a VolumeRef.
volume_ref() {
    [[ $1 == */* ]] || die "$1 is not POOL/VOLUME"
    jq --null-input --compact-output --arg pool "${1%%/*}" --arg name "${1#*/}" '{pool: $pool, name: $name}'
}

# A size such as 20G or 20GiB in bytes.
bytes() { # SIZE
    local size=${1^^}
    [[ $size != *[KMGT]IB ]] || size=${size%IB}
    numfmt --from=iec -- "$size" 2>/dev/null || die "$1 is not a size such as 20G or 20GiB"
}

# A list of devices, JSON, with one more.
with_device() { # LIST ROLE:SIZE[:MOUNT] PERSISTENT
    local role size mount
    IFS=: read -r role size mount <<<"$2"
    jq --arg role "DEVICE_ROLE_${role^^}" --arg size "$(bytes "$size")" --arg mount "$mount" --argjson persistent "$3" \
        '. + [{role: $role, sizeBytes: $size, mount: $mount, persistent: $persistent}]' <<<"$1"
}
