#!/usr/bin/env bash
# usage: host-info.sh [--json]
# Prints what the host is and has: hypervisors, pools with free space, filesystems, tools, renders at work.
#   --json   the whole answer
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

filter="$JQ_SIZE"'"cloudletd    \(.version)  on \(.kernel) \(.arch)",
    "hypervisors  \(.hypervisors | join(", ") | if . == "" then "none" else . end)",
    "filesystems  \(.filesystems | join(", "))",
    "state        \(.stateDirectory)  \(.stateFreeBytes | size) free",
    "renders      \(.rendersRunning) running, \(.rendersQueued) queued",
    (.pools[] | "pool         \(.name)  \(.kind)  \(.path)  \(if .kind == "directory" then "\(.freeBytes | size) of \(.totalBytes | size) free"
        else "devices: \(.devices | join(", "))" end)  formats: \([.formats[] | ltrimstr("VOLUME_FORMAT_") | ascii_downcase | gsub("_"; "-")] | join(", "))"),
    "confinement  \(.confinement | if (.error // "") != "" then "none: \(.error)" elif .confined then "on, without: \(.missing // [] | join("; ") | if . == "" then "nothing" else . end)" else "off" end)",
    "privileges   \(.confinement.keeper // "" | if . == "" then "the daemon'\''s own" else "the keeper'\''s (\(.))" end)",
    (.tools[] | "tool         \(.path)  \(.version)")'
for argument in "$@"; do
    case "$argument" in
        --help) help ;;
        --json) filter=. ;;
        *) die "unknown argument $argument (see --help)" ;;
    esac
done

call HostService/GetHostInfo <<<'{}' | jq --raw-output "$filter"
