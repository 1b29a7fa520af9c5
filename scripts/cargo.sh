#!/usr/bin/env bash
# cargo, held to the committed Cargo.lock where there is one.
#
#   scripts/cargo.sh SUBCOMMAND ARGUMENTS...
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:${HOME:-/root}/.cargo/bin
subcommand=$1
shift
locked=()
[ -e Cargo.lock ] && locked=(--locked)
exec cargo "$subcommand" "${locked[@]}" "$@"
