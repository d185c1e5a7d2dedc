# shellcheck shell=bash disable=SC2154 # variables are those of bench.sh
# Part of scripts/bench.sh: the daemon under load, its memory, processor time, flushes and start.

status() { # FIELD: of the daemon, KiB
    awk -v field="$1:" '$1 == field { print $2 }' "/proc/$daemon/status"
}

processor_ms() { # of the daemon and the children it has waited for
    awk -v hz="$(getconf CLK_TCK)" '{ sub(/^.*\) /, ""); print ($12 + $13 + $14 + $15) * 1000 / hz }' "/proc/$daemon/stat"
}

written_bytes() {
    awk '$1 == "write_bytes:" { print $2 }' "/proc/$daemon/io"
}

# `qemu-img create -b` and a flush for each, as many at a time; it injects nothing. Prints how many a second.
peer_per_second() { # IN-FLIGHT COUNT
    local begun=${EPOCHREALTIME/./}
    # shellcheck disable=SC2016 # for the shell that xargs starts
    seq "$2" | xargs --max-procs="$1" --replace=% sh -c 'qemu-img create -q -f qcow2 -F raw -b "$1" "$2/peer-$3" && sync "$2/peer-$3" "$2"' sh "$golden" "$work/volumes" %
    awk -v us=$((${EPOCHREALTIME/./} - begun)) -v count="$2" 'BEGIN { printf "%.1f", count * 1e6 / us }'
    find "$work/volumes" -name 'peer-*' -delete
}

load() {
    local image golden in_flight round count peer before after
    start_daemon "$work/state" "$work/volumes"
    ready_image
    stop_daemon
    start_daemon "$work/state" "$work/volumes"
    client render "$image" --count 1 >/dev/null
    sample load memory "resident, idle, MiB" "$(($(status VmRSS) / 1024))"
    for in_flight in 1 8 64 256; do
        say "load: $in_flight in flight"
        count=$((in_flight == 1 ? 100 : 400))
        for (( round = 0; round < runs; round++ )); do
            # In a variable first: both sides of a pipe would run at once.
            peer=$(peer_per_second "$in_flight" "$count")
            client render "$image" --count "$count" --in-flight "$in_flight" |
                jq --compact-output --argjson peer "$peer" 'del(.times_ms) + {peer_per_second: $peer}' >>"$work/load.jsonl"
        done
    done
    say "load: a thousand at once"
    before=$(written_bytes)
    client render "$image" --count 1000 --in-flight 1000 | jq --compact-output 'del(.times_ms)' >>"$work/load.jsonl"
    after=$(written_bytes)
    sample load bytes "written per instance, catalogue and deletion included, KiB" "$(((after - before) / 1000 / 1024))"
    sample load memory "resident, greatest, MiB" "$(($(status VmHWM) / 1024))"
    cp "$work/load.jsonl" "$dir/load.jsonl"
    stop_daemon
}

# Renders all the time while goldens are built from scratch.
memory() {
    local image golden other third
    local -a builds=()
    say "memory: 64 renders and two builds in flight"
    start_daemon "$work/state" "$work/volumes"
    ready_image
    other=$(client image "$dir/inputs/small.tar" | jq --raw-output .image)
    third=$(client image "$dir/inputs/debian.tar.xz" | jq --raw-output .image)
    stop_daemon
    start_daemon "$work/state" "$work/volumes"
    for other in "$other" "$third"; do
        client cold "$other" >/dev/null &
        builds+=($!)
    done
    client render "$image" --count 1500 --in-flight 64 >/dev/null
    sample load memory "resident, greatest, 64 renders and 2 cold builds in flight, MiB" "$(($(status VmHWM) / 1024))"
    wait "${builds[@]}"
    stop_daemon
}

# What one overlay costs: processor time of the daemon, and system calls that make things durable. Sections that keep their volumes have a state of their own.
cost() {
    local image golden before after
    say "cost"
    mkdir "$work/cost"
    start_daemon "$work/cost/state" "$work/cost/volumes"
    ready_image
    client render "$image" --count 5 --keep >/dev/null
    before=$(processor_ms)
    client render "$image" --count 400 --in-flight 8 --keep >/dev/null
    after=$(processor_ms)
    sample load cost "processor time per overlay, ms" "$(awk -v ms="$((after - before))" 'BEGIN { print ms / 400 }')"
    strace --follow-forks --summary-only --trace=fsync,fdatasync,sync_file_range,syncfs,msync --output="$work/strace" --attach="$daemon" 2>/dev/null &
    local tracer=$!
    sleep 1
    client render "$image" --count 100 --keep >/dev/null
    kill -INT "$tracer"
    wait "$tracer" || true
    sample load cost "flushes per overlay, one after another (fsync and its like)" "$(awk '$NF ~ /sync/ { calls += $4 } END { print calls / 100 }' "$work/strace")"
    stop_daemon
}

# From exec to the first answer, with ten thousand volumes in the catalogue.
start() {
    local image golden round
    say "start: ten thousand volumes"
    mkdir "$work/start"
    start_daemon "$work/start/state" "$work/start/volumes"
    ready_image
    client render "$image" --count 10000 --in-flight 64 --keep >/dev/null
    stop_daemon
    for (( round = 0; round < runs * 2; round++ )); do
        "$cloudletd" serve --config "$work/cloudletd.toml" 2>"$work/cloudletd.log" &
        daemon=$!
        sample start "10,000 volumes in the catalogue" "cloudletd, exec to first answer" "$(client answer --since "${EPOCHREALTIME/./}" | jq .ms)"
        stop_daemon
    done
}
