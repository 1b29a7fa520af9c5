# shellcheck shell=bash
# One daemon on each of several guests, chosen `verbs` by themselves. Sourced by programs of guests; VERBFS is the daemon's.
#
#   start_guest_node NAME NODES   this guest's daemon of cluster NAME, mounted at $MOUNT; returns when it serves
#   stop_guest_node               it must end by itself, and well

start_guest_node() {
    local name=$1 nodes=$2 other tries
    modprobe fuse
    SLOT=$((VM_GUEST - 1)) PLACE=/tmp/$name MOUNT=/tmp/$name/mnt
    mkdir -p "$PLACE/run" "$MOUNT"
    (umask 077 && printf '%032d' 7 > "$PLACE/key")
    {
        echo "cluster = \"$name\""; echo "key_file = \"$PLACE/key\""; echo 'fabric = "auto"'
        echo '[directories]'; echo "runtime = \"$PLACE/run\""; echo "data = \"/dev/shm/$name\""
        echo '[storage]'; echo "arena_size = \"${ARENA:-64MiB}\""
        echo '[cache]'; echo "size = \"${CACHE:-16MiB}\""
        # Everything is slow where processors are emulated.
        echo '[membership]'; echo 'peer_timeout = "30s"'
        for ((other = 0; other < nodes; other++)); do
            echo '[[nodes]]'; echo "slot = $other"; echo "address = \"198.18.0.$((other + 1)):4790\""
        done
    } > "$PLACE/verbfs.toml"
    "$VERBFS" start --foreground --config "$PLACE/verbfs.toml" --slot "$SLOT" --mount "$MOUNT" > "$PLACE/node.log" 2>&1 < /dev/null &
    DAEMON_PID=$!
    for ((tries = 0; tries < 600; tries++)); do
        if guest_node_serves; then
            guest_node_status | grep -o '"fabric": *"verbs ([^"]*"'
            return
        fi
        kill -0 "$DAEMON_PID" 2> /dev/null || break
        sleep 0.1
    done
    echo "the node does not serve"
    cat "$PLACE/node.log"
    return 1
}

guest_node_status() { "$VERBFS" status --config "$PLACE/verbfs.toml" --slot "$SLOT" --json 2> /dev/null; }
guest_node_serves() { guest_node_status | grep -q '"state": *"serving"' && mountpoint -q "$MOUNT"; }

stop_guest_node() {
    kill -TERM "$DAEMON_PID"
    wait "$DAEMON_PID" || { echo "the daemon did not end well"; tail -20 "$PLACE/node.log"; return 1; }
    if grep 'panicked at' "$PLACE/node.log"; then return 1; fi
}
