#!/usr/bin/env bash
# usage: backup.sh [--keep COUNT]
# Copies the catalogue to the directory backups of the state directory while the daemon serves, and prints where.
#   --keep COUNT   how many backups stay; the oldest go (default: all stay)
# CLOUDLETD_ADDR is the daemon's address (default unix:///run/cloudletd/cloudletd.sock).

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

keep=0
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help) help ;;
        --keep) keep=${2:?}; shift ;;
        *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done
jq --null-input --argjson keep "$keep" '{keep: $keep}' | call StoreService/BackupCatalog | jq --raw-output '"\(.path)\t\(.sizeBytes) bytes\t\(.digest)"'
