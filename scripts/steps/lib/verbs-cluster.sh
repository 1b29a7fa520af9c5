#!/usr/bin/env bash
# Daemons on `verbs`, all on this host, whose RDMA device has the address ADDRESS: what one node writes the others read.
# For a virtual machine: scripts/steps/verbs.sh.
set -euo pipefail
cd "$(dirname "$0")/../../.."
FABRIC=verbs ARENA=64MiB CACHE=16MiB NODES=${NODES:-2}
# Everything is slow where processors are emulated.
PEER_TIMEOUT=30s
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh

passed=0 failed=0
expect() {
    local what=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $what"
    fi
}
same_everywhere() {
    local slot
    for ((slot = 0; slot < NODES; slot++)); do cmp -s "$1" "$DIR/mnt/$slot/$2" || return 1; done
}
fabric_is_verbs() {
    "$VERBFS" status --config "$DIR/verbfs.toml" --slot "$1" --json | grep -q '"fabric": *"verbs ('
}

start_cluster
head -c 1500000 /dev/urandom > "$DIR/original"
for ((slot = 0; slot < NODES; slot++)); do
    expect "node $slot runs on verbs" fabric_is_verbs "$slot"
    mkdir "$DIR/mnt/$slot/made-by-$slot"
    cp "$DIR/original" "$DIR/mnt/$slot/made-by-$slot/file"
    expect "what node $slot wrote, all read" same_everywhere "$DIR/original" "made-by-$slot/file"
done
# Written here and there in turn: dirty pages change hands.
: > "$DIR/lines"
for ((line = 0; line < 20; line++)); do
    echo "line $line" >> "$DIR/lines"
    echo "line $line" >> "$DIR/mnt/$((line % NODES))/lines"
done
expect "appends of all nodes are in order" same_everywhere "$DIR/lines" lines
mv "$DIR/mnt/0/made-by-0/file" "$DIR/mnt/0/made-by-1/moved"
expect "a file moved by one node is moved for all" same_everywhere "$DIR/original" made-by-1/moved
sync "$DIR/mnt/1/made-by-1/moved"
expect "the cluster ends well" stop_cluster
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
