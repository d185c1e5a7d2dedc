#!/usr/bin/env bash
# usage: watch.sh RENDER [--json]
# Follows a render or prerender until it ends: a progress bar with stage, share and expected time on standard error, the outcome on
# standard output. Fails when the render did. Leaving it does not stop the render.
#   --json   every message as one line of JSON, no bar
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

render="" json=no
for argument in "$@"; do
    case "$argument" in
        --help) help ;;
        --json) json=yes ;;
        -*) die "unknown argument $argument (see --help)" ;;
        *) render=$argument ;;
    esac
done
[[ -n $render ]] || die "no render given (see --help)"

# draw STATE STAGE DONE TOTAL ETA: the bar; one line that is drawn over on a terminal, a line per change of stage otherwise.
last=""
draw() {
    local share="" bar="" filled
    if (( $4 > 0 )); then
        share=$(( $3 * 100 / $4 ))
        filled=$(printf '%*s' $(( share * 30 / 100 )) '')
        bar=$(printf '[%-30s] %3d%%' "${filled// /#}" "$share")
    fi
    if [[ -t 2 ]]; then
        printf '\r%-10s %-8s %-38s %-12s' "$1" "$2" "$bar" "${5:+ETA $5}" >&2
    elif [[ $1/$2 != "$last" ]]; then
        echo "$1 $2 ${share:+$share%} ${5:+ETA $5}" >&2
        last=$1/$2
    fi
}

end=$(mktemp)
trap 'rm --force "$end"' EXIT
jq --null-input --arg id "$render" '{renderId: $id}' | call RenderService/WatchRender | jq --compact-output --unbuffered .render | while read -r message; do
    echo "$message" >"$end"
    [[ $json == no ]] || { echo "$message"; continue; }
    IFS='|' read -r state stage bytes total eta < <(jq --raw-output '[(.state | ltrimstr("RENDER_STATE_") | ascii_downcase), .stage, .bytesDone, .bytesTotal, (.eta // "")] | join("|")' <<<"$message")
    draw "$state" "$stage" "$bytes" "$total" "$eta"
done
[[ $json == yes || ! -t 2 ]] || echo >&2
[[ $json == yes ]] || jq --raw-output '"\(.id)  \(.state | ltrimstr("RENDER_STATE_") | ascii_downcase)\(if .error then "  \(.error.reason): \(.error.message) \(.error.hint)" else "" end)"' "$end"
jq --exit-status '.state == "RENDER_STATE_SUCCEEDED"' "$end" >/dev/null
