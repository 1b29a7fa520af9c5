#!/usr/bin/env bash
# One of two hosts, each a virtual machine with a software RDMA device and one daemon, which choose `verbs` by themselves.
# What one host writes the other reads. For the guests of scripts/steps/verbs.sh; VERBFS is the program.
set -euo pipefail
modprobe fuse
directory=/tmp/hosts slot=$((VM_GUEST - 1))
mkdir -p "$directory/run" "$directory/mnt"
(umask 077 && printf '%032d' 7 > "$directory/key")
{
    echo 'cluster = "hosts"'; echo "key_file = \"$directory/key\""; echo 'fabric = "auto"'
    echo '[directories]'; echo "runtime = \"$directory/run\""; echo 'data = "/dev/shm/hosts"'
    echo '[storage]'; echo 'arena_size = "64MiB"'
    echo '[cache]'; echo 'size = "16MiB"'
    echo '[membership]'; echo 'peer_timeout = "30s"'
    for other in 0 1; do
        echo '[[nodes]]'; echo "slot = $other"; echo "address = \"198.18.0.$((other + 1)):4790\""
    done
} > "$directory/verbfs.toml"

"$VERBFS" start --foreground --config "$directory/verbfs.toml" --slot "$slot" --mount "$directory/mnt" \
    > "$directory/log" 2>&1 < /dev/null &
daemon=$!
status() { "$VERBFS" status --config "$directory/verbfs.toml" --slot "$slot" --json 2> /dev/null; }
serves() { status | grep -q '"state": *"serving"' && mountpoint -q "$directory/mnt"; }
for ((tries = 0; tries < 600; tries++)); do
    if serves; then break; fi
    kill -0 "$daemon" || { cat "$directory/log"; exit 1; }
    sleep 0.1
done
serves || { echo "the node does not serve"; cat "$directory/log"; exit 1; }
status | grep -o '"fabric": *"verbs ([^"]*"'

vm-barrier serving
seq 1 30000 > "$directory/expected"
[ "$VM_GUEST" != 2 ] || cp "$directory/expected" "$directory/mnt/file"
vm-barrier written
cmp "$directory/expected" "$directory/mnt/file"
echo "line of host $VM_GUEST" >> "$directory/mnt/lines"
vm-barrier appended
[ "$(sort "$directory/mnt/lines")" = $'line of host 1\nline of host 2' ]
vm-barrier compared
kill -TERM "$daemon"
wait "$daemon"
echo "host $VM_GUEST: same bytes, ended well"
