#!/usr/bin/env bash
# In one guest: what run.sh promises of it holds. Run by scripts/steps/vm.sh. Ends with status 9 when all is well, so that a
# status which is passed on can be told from one that is made up.
set -euo pipefail
DIR=$(mktemp -d)
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

root_is_read_only() {
    refuses touch /verbfs-vm-was-here
    refuses touch "$PWD/verbfs-vm-was-here"
    [ -s README.md ]
}
results_are_written() {
    echo "written by guest $VM_GUEST" > "$VM_RESULTS/note"
    echo "shared by guest $VM_GUEST" > "$VM_SHARED/note"
}
own_memory_is_writable() {
    local path
    for path in /tmp /run /dev/shm /var/tmp; do
        echo x > "$path/verbfs-vm-try"
        rm "$path/verbfs-vm-try"
    done
    same 'file system of /dev/shm' tmpfs "$(stat -f -c %T /dev/shm)"
}
# What a daemon asks of its host.
daemons_can_run() {
    same 'locked memory' unlimited "$(ulimit -l)"
    [ -c /dev/fuse ]
    # shellcheck disable=SC2188 # opened and closed, no more
    <> /dev/fuse
    grep -qw fuse /proc/filesystems
    [ "$(awk '/MemTotal/ { print $2 }' /proc/meminfo)" -le $((2 * 1024 * 1024)) ]
}
stock_kernel() {
    uname -v | grep Debian
    same 'clock source' hpet "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
}
softroce_is_up() {
    grep ACTIVE /sys/class/infiniband/rxe0/ports/1/state
    ibv_devices | grep rxe0
    ibv_devinfo -d rxe0 | grep 'active_mtu:.*4096'
}
ping_within() {
    local server
    rping -s -a "$VM_ADDRESS" -C 10 > "$DIR/server" 2>&1 &
    server=$!
    within 20 rping -c -a "$VM_ADDRESS" -C 10 -v > "$DIR/client" 2>&1
    grep 'rdma-ping-9:' "$DIR/client"
    wait "$server"
}
no_server_no_ping() {
    refuses timeout 20 rping -c -a "$VM_ADDRESS" -C 1
}
writes_within() {
    local server
    ib_write_bw -d rxe0 -n 200 > "$DIR/server" 2>&1 &
    server=$!
    within 20 ib_write_bw -d rxe0 -n 200 "$VM_ADDRESS" > "$DIR/client" 2>&1
    grep -E '^ 65536 +200 ' "$DIR/client"
    wait "$server"
}
link_goes_and_comes_back() {
    vm-link down
    grep DOWN /sys/class/infiniband/rxe0/ports/1/state
    vm-link up
    ping_within
}
wrong_use_is_refused() {
    refuses vm-link sideways
    refuses vm-control kill 2
    refuses vm-control hug 1
}

check root_is_read_only 30 root_is_read_only
check results_are_written 30 results_are_written
check own_memory_is_writable 30 own_memory_is_writable
check daemons_can_run 30 daemons_can_run
check stock_kernel 30 stock_kernel
check softroce_is_up 30 softroce_is_up
check ping_within 60 ping_within
check no_server_no_ping 30 no_server_no_ping
check writes_within 60 writes_within
check link_goes_and_comes_back 90 link_goes_and_comes_back
check wrong_use_is_refused 30 wrong_use_is_refused
finish
(exit 9)
