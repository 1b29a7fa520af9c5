# shellcheck shell=bash
# Clusters of daemons on this host, for the system steps. Sourced by scripts/steps/*.sh.
#
# A step gets VERBFS_TEST_DIR, below which everything lies that it makes; `start_cluster` puts sockets, stores and
# mounts there, `stop_cluster` ends them. The exit trap ends whatever is left.

VERBFS=${VERBFS:-${CARGO_TARGET_DIR:-target}/release/verbfs}
BIN=${BIN:-${CARGO_TARGET_DIR:-target}/release}
DIR=${VERBFS_TEST_DIR:?run this by scripts/test.sh, or set VERBFS_TEST_DIR to an empty directory}
# Names of clusters must not meet on one host.
CLUSTER=${CLUSTER:-test$$}
ARENA=${ARENA:-512MiB}
CACHE=${CACHE:-64MiB}
CHUNK=${CHUNK:-1MiB}
PEER_TIMEOUT=${PEER_TIMEOUT:-10s}
NODES=${NODES:-3}
# With verbs: the address of an RDMA device of this host.
FABRIC=${FABRIC:-shm}
ADDRESS=${ADDRESS:-localhost}
declare -A DAEMON

# Storage on memory where there is some: the steps test verbfs, not this host's disk.
data_directory() {
    if [ -z "${DATA:-}" ]; then
        if [ -w /dev/shm ]; then DATA=$(mktemp -d "/dev/shm/verbfs-$CLUSTER-XXXXXX"); else DATA=$DIR/data; fi
    fi
}

write_config() {
    data_directory
    mkdir -p "$DIR/run" "$DATA"
    [ -s "$DIR/key" ] || (umask 077 && head -c 32 /dev/urandom > "$DIR/key")
    {
        echo "cluster = \"$CLUSTER\""
        echo "key_file = \"$DIR/key\""
        echo "fabric = \"$FABRIC\""
        echo "[directories]"; echo "runtime = \"$DIR/run\""; echo "data = \"$DATA\""
        echo "[storage]"; echo "arena_size = \"$ARENA\""; echo "chunk_size = \"$CHUNK\""
        echo "[cache]"; echo "size = \"$CACHE\""
        echo "[membership]"; echo "peer_timeout = \"$PEER_TIMEOUT\""
        [ -z "${LOCKS:-}" ] || { echo "[locks]"; echo "$LOCKS"; }
        echo "[log]"; echo "level = \"${LOG_LEVEL:-info}\""
        local slot
        for ((slot = 0; slot < NODES; slot++)); do
            echo "[[nodes]]"; echo "slot = $slot"; echo "address = \"$ADDRESS:$((4790 + slot))\""
        done
    } > "$DIR/verbfs.toml"
}

# start_node SLOT: a daemon in the foreground of a job of ours, mounted at $DIR/mnt/SLOT.
start_node() {
    local slot=$1
    mkdir -p "$DIR/mnt/$slot"
    "$VERBFS" start --foreground --config "$DIR/verbfs.toml" --slot "$slot" --mount "$DIR/mnt/$slot" \
        >> "$DIR/node$slot.log" 2>&1 < /dev/null &
    DAEMON[$slot]=$!
}

wait_for_node() {
    local slot=$1 tries
    for ((tries = 0; tries < 300; tries++)); do
        if "$VERBFS" status --config "$DIR/verbfs.toml" --slot "$slot" --json 2> /dev/null | grep -q '"state": *"serving"' \
            && mountpoint -q "$DIR/mnt/$slot"; then
            return 0
        fi
        kill -0 "${DAEMON[$slot]}" 2> /dev/null || { echo "node $slot ended:"; tail -20 "$DIR/node$slot.log"; return 1; }
        sleep 0.1
    done
    echo "node $slot does not serve after 30 s:"
    tail -20 "$DIR/node$slot.log"
    return 1
}

start_cluster() {
    write_config
    local slot
    for ((slot = 0; slot < NODES; slot++)); do start_node "$slot"; done
    for ((slot = 0; slot < NODES; slot++)); do wait_for_node "$slot"; done
    MOUNTS=()
    for ((slot = 0; slot < NODES; slot++)); do MOUNTS+=(--mount "$DIR/mnt/$slot"); done
}

# Every daemon must end by itself and well; the others leave while it does.
stop_cluster() {
    local slot status=0
    for slot in "${!DAEMON[@]}"; do kill -TERM "${DAEMON[$slot]}" 2> /dev/null || true; done
    for slot in "${!DAEMON[@]}"; do
        if ! wait "${DAEMON[$slot]}"; then
            echo "node $slot did not end well:"
            tail -20 "$DIR/node$slot.log"
            status=1
        fi
        unset "DAEMON[$slot]"
        if mountpoint -q "$DIR/mnt/$slot"; then echo "node $slot left its mount"; status=1; fi
    done
    if grep -l 'panicked at' "$DIR"/node*.log; then status=1; fi
    return $status
}

# For the exit trap: no questions asked.
end_cluster() {
    local slot
    for slot in "${!DAEMON[@]}"; do kill -KILL "${DAEMON[$slot]}" 2> /dev/null || true; done
    for slot in "${!DAEMON[@]}"; do wait "${DAEMON[$slot]}" 2> /dev/null || true; done
    for slot in "$DIR"/mnt/*; do umount -l "$slot" 2> /dev/null || true; done
    case "${DATA:-}" in /dev/shm/verbfs-*) rm -rf "$DATA" ;; esac
}
trap end_cluster EXIT
