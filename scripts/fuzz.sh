#!/usr/bin/env bash
# usage: fuzz.sh TARGET [SECONDS]
# Runs a fuzz target of fuzz/fuzz_targets, for a minute by default. What it learns is kept in target/fuzz-corpus/TARGET, an input that fails in
# fuzz/artifacts/TARGET. Installs cargo-fuzz below target/tools when it is not there. Stable Rust will do. More in fuzz/README.md.

set -euo pipefail
[[ ${1:---help} != --help ]] || { sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; exit 0; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools=$root/target/tools
command -v c++ >/dev/null || { echo "fuzz.sh: a C++ compiler is needed, libFuzzer being C++ (scripts/setup-debian.sh --test installs it)" >&2; exit 1; }
readonly CARGO_FUZZ=0.13.2

if [[ ! -e $tools/.cargo-fuzz-$CARGO_FUZZ ]]; then
    cargo install --quiet --locked --force --root "$tools" --target-dir "$root/target/tools-build" cargo-fuzz --version "$CARGO_FUZZ"
    rm --recursive --force "$root/target/tools-build"
    touch "$tools/.cargo-fuzz-$CARGO_FUZZ"
fi

# cargo-fuzz wants flags that are not stable yet. No sanitizer: there is nothing unsafe in what is fuzzed, and without one it runs twice as fast.
export PATH=$tools/bin:$PATH RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}/fuzz
fuzz=$root/fuzz learnt=$root/target/fuzz-corpus/$1
mkdir --parents "$learnt"
options=(-max_total_time="${2:-60}" -rss_limit_mb=1024 -timeout=10 -print_final_stats=1)
case $1 in
    tar_reader | squashfs) options+=(-max_len=32768) ;;
    ext4_*) options+=(-max_len=1024) ;;
    *) options+=(-max_len=8192) ;;
esac
[[ ! -e $fuzz/dict/$1.dict ]] || options+=(-dict="$fuzz/dict/$1.dict")
exec cargo fuzz run --fuzz-dir "$fuzz" --sanitizer "${SANITIZER:-none}" "$1" "$learnt" "$fuzz/corpus/$1" -- "${options[@]}"
