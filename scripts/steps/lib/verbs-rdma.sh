#!/usr/bin/env bash
# `verbfs rdma` in a guest with SoftRoCE: what is there is found, what is taken away is named with the way to mend it, and comes
# back. For the guest of scripts/steps/verbs.sh; VERBFS is the program, DIR an empty directory.
set -euo pipefail
cd "$(dirname "$0")/../../.."
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

# says STATUS PATTERN COMMAND...: the command ends with STATUS and says each line of PATTERN, parts of its lines.
says() {
    local expected=$1 patterns=$2 status=0 pattern said
    shift 2
    said=$("$@" 2>&1) || status=$?
    echo "$said"
    same 'exit status' "$expected" $status
    while IFS= read -r pattern; do
        [[ $said == *"$pattern"* ]] || { echo "not said: $pattern"; return 1; }
    done <<< "$patterns"
}
rdma() { "$VERBFS" rdma "$@"; }
devices() { ls /sys/class/infiniband; }

found() {
    says 0 $'ok       rxe0 port 1 on eth0 is active\nrxe0 can be opened\nRoCE v2\nmemory can be locked' rdma check
    says 0 "$VM_ADDRESS is an address of rxe0 port 1" rdma check --address "$VM_ADDRESS"
    says 1 'no RDMA device serves 127.0.0.1' rdma check --address 127.0.0.1
}
down_and_up() {
    says 1 'there is no SoftRoCE device rxe7, nor one on an interface rxe7; there are: rxe0 on eth0' rdma down rxe7
    says 0 'removed rxe0 from eth0' rdma down
    same devices '' "$(devices)"
    says 1 $'missing  no RDMA device\nverbfs rdma up INTERFACE' rdma check
    says 1 'there is no SoftRoCE device' rdma down
    says 0 'made rxe0 on eth0' rdma up
    says 0 'rxe0 was there' rdma up eth0
    says 1 'eth0 carries rxe0 already' rdma up eth0 --name other
    says 0 'removed rxe0' rdma down eth0
    says 0 'made other on eth0' rdma up eth0 --name other
    says 0 'removed other' rdma down other
    says 1 'there is no interface eth7; there are: eth0' rdma up eth7
    says 1 'lo is no Ethernet interface' rdma up lo
    says 1 'be root, or have CAP_NET_ADMIN' setpriv --reuid 65534 --clear-groups "$VERBFS" rdma up eth0
    says 0 'made rxe0' rdma up eth0
    says 0 'rxe0 can be opened' rdma check
}
modules_come_back() {
    rmmod rdma_ucm
    says 1 $'missing  the connection manager: /dev/infiniband/rdma_cm is not there' rdma check
    says 0 'removed' rdma down
    rmmod rdma_rxe
    says 1 $'no RDMA device\nrdma_rxe' rdma check
    says 0 'made rxe0 on eth0' rdma up eth0
    says 0 'the connection manager can be used' rdma check
    # Where they cannot be loaded, that is what is said.
    says 0 'removed' rdma down
    rmmod rdma_rxe
    says 1 'cannot load the module rdma_rxe' env MODPROBE_OPTIONS="-d /nonexistent" "$VERBFS" rdma up eth0
    says 1 'cannot load the module rdma_rxe: modprobe: No such file' env PATH=/nonexistent "$VERBFS" rdma up eth0
    says 0 'made rxe0 on eth0' rdma up eth0
}
ports_and_permissions() {
    ip link set dev eth0 mtu 1500
    says 0 $'note     rxe0 port 1 on eth0 is active; its packets are small\nip link set dev eth0 mtu 4200' rdma check
    ip link set dev eth0 mtu 4500
    ip link set dev eth0 down
    says 1 $'missing  rxe0 port 1 on eth0 is DOWN\nip link set dev eth0 up' rdma check
    vm-link up
    chmod 600 /dev/infiniband/uverbs0
    says 1 $'/dev/infiniband/uverbs0: Permission denied\nbe root, or let' setpriv --reuid 65534 --clear-groups "$VERBFS" rdma check
    chmod 666 /dev/infiniband/uverbs0
    says 0 'rxe0 can be opened' rdma check
}
limits() {
    {
        echo 'cluster = "limits"'; echo "key_file = \"$DIR/key\""; echo 'fabric = "verbs"'
        echo "nodes = [{slot = 0, address = \"$VM_ADDRESS:4790\"}, {slot = 1, address = \"198.18.0.2:4790\"}]"
        echo '[storage]'; echo 'arena_size = "64MiB"'; echo '[cache]'; echo 'size = "16MiB"'
    } > "$DIR/verbfs.toml"
    (umask 077 && head -c 32 /dev/urandom > "$DIR/key")
    # Root without the capability, as in a container.
    local bounded=(setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock prlimit)
    says 1 $'missing  at most 8 MiB can be locked, and 96 MiB are needed: arena, cache and 1 peers\nLimitMEMLOCK=infinity' \
        "${bounded[@]}" --memlock=8388608:8388608 "$VERBFS" rdma check --config "$DIR/verbfs.toml"
    says 0 'memory can be locked: up to 96 MiB' "${bounded[@]}" --memlock=100663296:100663296 "$VERBFS" rdma check --config "$DIR/verbfs.toml"
    says 0 'note     at most 8 MiB can be locked' "${bounded[@]}" --memlock=8388608:8388608 "$VERBFS" rdma check
}
in_use() {
    local server
    ib_write_bw -d rxe0 > "$DIR/server" 2>&1 &
    server=$!
    # shellcheck disable=SC2317 # called by `within`
    opened() { compgen -G "/proc/$server/fd/*" > /dev/null && find "/proc/$server/fd" -lname '/dev/infiniband/uverbs*' | grep -q .; }
    within 20 opened
    says 1 "rxe0 is in use by ib_write_bw ($server); stop them first, or say --force" rdma down
    same devices rxe0 "$(devices)"
    kill "$server"
    wait "$server" || true
    says 0 'removed rxe0' rdma down
    says 0 'made rxe0' rdma up
}

check rdma_found 60 found
check rdma_down_and_up 120 down_and_up
check rdma_modules_come_back 120 modules_come_back
check rdma_ports_and_permissions 60 ports_and_permissions
check rdma_limits 60 limits
check rdma_in_use 60 in_use
finish
