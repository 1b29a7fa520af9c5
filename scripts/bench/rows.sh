#!/usr/bin/env bash
# Every row of the table: brings up a cluster of three, a volume with a single member and three mounts that do nothing,
# all at once, and lets verbfs-bench measure them in turns. Prints Markdown.
#
#   VERBFS, BIN       the program and where its sisters are (default: target/release)
#   BENCH_ROUNDS      samples of each side (default 7)
#   BENCH_FILL        seconds in which files are made for the row on memory (default 60)
#   BENCH_ONLY        one group of rows: mailbox, transfers, shared, hand, stat, names, idle, memory
set -euo pipefail
cd "$(dirname "$0")/../.."
TARGET=${CARGO_TARGET_DIR:-target}
VERBFS=${VERBFS:-$TARGET/release/verbfs}
BIN=${BIN:-$TARGET/release}
ONLY=${BENCH_ONLY:-}
VERBFS_TEST_DIR=$(mktemp -d "${TMPDIR:-/tmp}/verbfs-bench-XXXXXX")
export VERBFS BIN VERBFS_TEST_DIR CLUSTER=bench$$ ARENA=1GiB CACHE=256MiB LOG_LEVEL=warn
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh

finish() {
    end_cluster
    rm -rf "$DIR"
}
trap finish EXIT

start_single() {
    cp "$DIR/verbfs.toml" "$DIR/three.toml"
    CLUSTER=${CLUSTER}one NODES=1 write_config
    mv "$DIR/verbfs.toml" "$DIR/one.toml"
    mv "$DIR/three.toml" "$DIR/verbfs.toml"
    mkdir -p "$DIR/mnt/one"
    "$VERBFS" start --foreground --config "$DIR/one.toml" --slot 0 --mount "$DIR/mnt/one" >> "$DIR/nodeone.log" 2>&1 < /dev/null &
    DAEMON[one]=$!
}

start_null() {
    local number directories=()
    for number in 0 1 2; do directories+=("$DIR/mnt/null$number"); done
    mkdir -p "${directories[@]}"
    "$BIN/verbfs-bench" null "${directories[@]}" >> "$DIR/nodenull.log" 2>&1 < /dev/null &
    DAEMON[null]=$!
}

wait_for_mounts() {
    local name tries
    for name in "$@"; do
        for ((tries = 0; tries < 100; tries++)); do
            mountpoint -q "$DIR/mnt/$name" && break
            sleep 0.1
        done
        mountpoint -q "$DIR/mnt/$name" || { echo "no mount at $name:"; cat "$DIR"/node*.log; return 1; }
    done
}

pids() {
    local slot
    for slot in 0 1 2; do echo --pid; echo "${DAEMON[$slot]}"; done
}

measure_rows() {
    start_cluster
    start_single
    start_null
    wait_for_mounts one null0 null1 null2
    local mounts=(--one "$DIR/mnt/one") slot
    for slot in 0 1 2; do mounts+=(--three "$DIR/mnt/$slot" --null "$DIR/mnt/null$slot"); done
    mapfile -t processes < <(pids)
    "$BIN/verbfs-bench" rows "${mounts[@]}" "${processes[@]}" --verbfs "$VERBFS" --config "$DIR/verbfs.toml" \
        --pingpong "$BIN/examples/pingpong" --rounds "${BENCH_ROUNDS:-7}" --only "$ONLY" --out "$DIR/rows"
    stop_cluster
}

# The store and the arena on a disk, so that the memory they are mapped to counts as files and not as shared memory.
measure_memory() {
    case "${DATA:-}" in /dev/shm/verbfs-*) rm -rf "$DATA" ;; esac
    DATA=$DIR/data
    CLUSTER=${CLUSTER}memory
    start_cluster
    mapfile -t processes < <(pids)
    "$BIN/verbfs-bench" memory --mount "$DIR/mnt/0" "${processes[@]}" --seconds "${BENCH_FILL:-60}" --out "$DIR/rows"
    stop_cluster
}

{
    if [ "$ONLY" != memory ]; then measure_rows; fi
    if [ -z "$ONLY" ] || [ "$ONLY" = memory ]; then measure_memory; fi
} >&2
echo "Three daemons of one cluster (fabric \`shm\`), one daemon of a volume with a single member, and a do-nothing FUSE file system,"
echo "all on this host's $(nproc) processors, with stores on memory (for the row on memory: on disk). Each side is sampled ${BENCH_ROUNDS:-7} times"
echo "of a host that may have other work, hence in turns: figures are medians, the ratio is the median of the rounds' ratios. Load of the host when this was written: $(cut -d' ' -f1-3 /proc/loadavg)."
echo
"$BIN/verbfs-bench" report "$DIR/rows"
