#!/usr/bin/env bash
# usage: tools.sh [grpcurl] [buf] [simplestreams] [moto]
# Puts the tools that Debian does not have into target/tools: grpcurl (for the operator scripts), buf (checks the protocol files), simplestreams
# (sstream-query and sstream-mirror, judges of what is published), moto (a server of S3). All by default; each only when that version is not there. Prints nothing when there is nothing to do.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools=$root/target/tools
readonly GRPCURL_RS=0.2.1 BUF=1.75.0 SIMPLESTREAMS=0.1.0.post59 MOTO=5.2.5

make_grpcurl() {
    # Any grpcurl that is installed will do: the scripts use what the Go and the Rust program have in common.
    command -v grpcurl >/dev/null && return
    [[ -x $tools/bin/grpcurl && -e $tools/.grpcurl-$GRPCURL_RS ]] && return
    echo "building grpcurl"
    # Not optimised: it sends one request and ends, and builds in half the time.
    CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_OPT_LEVEL=0 cargo install --quiet --locked --force --debug --root "$tools" \
        --target-dir "$root/target/tools-build" grpcurl-rs --version "$GRPCURL_RS"
    rm --recursive --force "$root/target/tools-build"
    touch "$tools/.grpcurl-$GRPCURL_RS"
}

make_buf() {
    [[ -x $tools/node_modules/.bin/buf && -e $tools/.buf-$BUF ]] && return
    echo "installing buf"
    mkdir --parents "$tools"
    npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$tools" "@bufbuild/buf@$BUF"
    touch "$tools/.buf-$BUF"
}

make_simplestreams() {
    command -v sstream-query >/dev/null && command -v sstream-mirror >/dev/null && return
    # Its programs name their interpreter by an absolute path: a checkout that was moved has them made again.
    [[ -e $tools/.simplestreams-$SIMPLESTREAMS ]] && "$tools/simplestreams/bin/sstream-query" --help >/dev/null 2>&1 && return
    echo "installing simplestreams"
    mkdir --parents "$tools"
    python3 -m venv --clear "$tools/simplestreams"
    "$tools/simplestreams/bin/pip" install --quiet --disable-pip-version-check "python-simplestreams==$SIMPLESTREAMS"
    touch "$tools/.simplestreams-$SIMPLESTREAMS"
}

make_moto() {
    [[ -e $tools/.moto-$MOTO ]] && return
    echo "installing moto"
    mkdir --parents "$tools"
    python3 -m venv --clear "$tools/moto"
    "$tools/moto/bin/pip" install --quiet --disable-pip-version-check "moto[s3,server]==$MOTO"
    touch "$tools/.moto-$MOTO"
}

case "${1:-}" in
    --help) sed --quiet '2,/^$/ s/^# \{0,1\}//p' "$0"; exit 0 ;;
    "") make_grpcurl; make_buf; make_simplestreams; make_moto ;;
    *) for tool in "$@"; do "make_$tool"; done ;;
esac
