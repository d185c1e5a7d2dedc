#!/usr/bin/env bash
# usage: load.sh
# Runs the load test (tests/load.rs) on an optimised build and prints its times: 1,000 calls of GetHostInfo at a time, among clients that are silent, stall
# or leave. Nothing else should be running; the clients share the machine with the daemon.

set -euo pipefail
[[ ${1:-} != --help ]] || { sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cargo test --locked --release --test load -- --nocapture | sed --quiet 's/^.*load: //p'
