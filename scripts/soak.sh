#!/usr/bin/env bash
# usage: soak.sh [MINUTES] [--seed SEED]
# Kills a daemon that is root and one without privileges, behind a keeper, again and again, at every step of its journal and at random moments, over all targets,
# for so many minutes (default 10), and prints what was counted. Needs root, and what scripts/setup-debian.sh --test installs. The seed it prints repeats the same
# sequence of operations and moments.

set -euo pipefail
[[ ${1:-} != --help ]] || { sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=10
while [[ $# -gt 0 ]]; do
    case "$1" in
        --seed) export CLOUDLETD_CRASH_SEED=${2:?}; shift ;;
        [0-9]*) minutes=$1 ;;
        *) echo "soak.sh: unknown argument $1 (see --help)" >&2; exit 1 ;;
    esac
    shift
done
[[ $EUID -eq 0 ]] || { echo "soak.sh: loop devices need root" >&2; exit 1; }
CLOUDLETD_CRASH_MINUTES=$minutes cargo test --locked --profile "${CARGO_PROFILE:-checked}" --test crash -- --nocapture |
    grep --line-buffered --invert-match '^round '
