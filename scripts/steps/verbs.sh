#!/usr/bin/env bash
# RDMA, in virtual machines with software devices: the conformance suite on `verbs`, one test at a time, faults made to happen on it, `verbfs rdma`,
# then daemons on it.
set -euo pipefail
cd "$(dirname "$0")/../.."

LIMIT=${LIMIT:-1000} # seconds for the whole guest; a test waits for one thing at most PATIENCE seconds
PATIENCE=60
VERBFS=$(realpath "${VERBFS:-${CARGO_TARGET_DIR:-target}/release/verbfs}")

# The programs are built here and run there: the guest sees the source tree and the target directory where they are.
test_program() {
    scripts/cargo.sh test --release -p verbfs-rdma "$@" --no-run --message-format=json |
        grep -o '"executable":"[^"]*"' | cut -d'"' -f4 | tail -1
}
program=$(test_program --test conformance_verbs)
faults=$(test_program --lib)
if ! [ -x "$program" ] || ! [ -x "$faults" ]; then
    echo "verbs: the test programs were not built" >&2
    exit 1
fi

# The test `child` is the program of another test's child process, and none by itself.
# shellcheck disable=SC2016 # the variables are the guest's
tests/vm/run.sh --memory 2G --limit "$LIMIT" -- bash -c '
    set -e
    export VERBFS_RDMA_ADDRESS=$VM_ADDRESS VERBFS_TEST_PATIENCE=$3 TMPDIR=/dev/shm
    "$1" --ignored --test-threads=1 --skip child
    "$4" --ignored --nocapture --test-threads=1 --skip echo_child --skip host_of_two verbs::faults
    mkdir /tmp/rdma
    VERBFS=$2 DIR=/tmp/rdma scripts/steps/lib/verbs-rdma.sh
    modprobe fuse
    export ADDRESS=$VM_ADDRESS VERBFS=$2 VERBFS_TEST_DIR=/tmp/cluster
    mkdir "$VERBFS_TEST_DIR"
    scripts/steps/lib/verbs-cluster.sh
' verbs "$program" "$VERBFS" "$PATIENCE" "$faults"

# Two hosts: two kernels, two devices, a switch between them.
tests/vm/run.sh --guests 2 --memory 1G --limit 200 -- env "VERBFS=$VERBFS" scripts/steps/lib/verbs-hosts.sh
echo "1 passed, 0 failed"
