#!/usr/bin/env bash
# The conformance suite on `verbs`: in a virtual machine with a software RDMA device, one test at a time.
set -euo pipefail
cd "$(dirname "$0")/../.."

LIMIT=${LIMIT:-500} # seconds for the whole guest; tests of the suite wait for one thing at most PATIENCE seconds
PATIENCE=60

# The program is built here and run there: the guest sees the source tree and the target directory where they are.
program=$(scripts/cargo.sh test --release -p verbfs-rdma --test conformance_verbs --no-run --message-format=json |
    grep -o '"executable":"[^"]*"' | cut -d'"' -f4 | tail -1)
[ -x "$program" ] || { echo "verbs: the test program was not built" >&2; exit 1; }

# An address of the guest, not of this host.
# shellcheck disable=SC2016
tests/vm/run.sh --limit "$LIMIT" -- bash -c '
    export VERBFS_RDMA_ADDRESS=$VM_ADDRESS VERBFS_TEST_PATIENCE='"$PATIENCE"' TMPDIR=/dev/shm
    exec "$1" --ignored --test-threads=1 --skip child # a program for another test, not a test
' verbs "$program"
