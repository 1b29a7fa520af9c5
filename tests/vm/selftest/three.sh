#!/usr/bin/env bash
# In three guests: they reach each other, links and guests go and come back, and all have one time base.
# Run by scripts/steps/vm.sh; $1 is the program verbfs-vm-clock.
set -euo pipefail
DIR=$(mktemp -d)
CLOCK=$1
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

# A guest that was started again only shows that it is there.
if [ "$VM_BOOT" = 2 ]; then
    touch "$VM_SHARED/back"
    check started_again 30 test -e "$VM_SHARED/back"
    finish
    exit 0
fi

NEXT=$((VM_GUEST % VM_GUESTS + 1))
ROUNDS=200
# The host takes part as the last member.
MEMBERS=$((VM_GUESTS + 1))

pings_next() { # NAME
    local server
    rping -s -a "$VM_ADDRESS" -C 5 > "$DIR/server" 2>&1 &
    server=$!
    vm-barrier "$1-listening"
    within 20 timeout 20 rping -c -a "198.18.0.$NEXT" -C 5 -v > "$DIR/client" 2>&1
    grep 'rdma-ping-4:' "$DIR/client"
    wait "$server"
}
# ib_write_bw writes 200 times 64 KiB from guest 2 to guest 1. Behind the writes it measures the processor's frequency for its
# report, and on a loaded host refuses to report ("Correlation coefficient"): so what counts is what the device counted.
writes_between() {
    local command=(ib_write_bw -d rxe0 -R -u 20 -n 200) counter=rcvd_pkts before server=
    local counters=/sys/class/infiniband/rxe0/ports/1/hw_counters
    [ "$VM_GUEST" = 1 ] || counter=sent_pkts
    before=$(cat $counters/$counter)
    if [ "$VM_GUEST" = 1 ]; then
        "${command[@]}" > "$DIR/writes" 2>&1 &
        server=$!
        vm-barrier writes-done 100
        # It waits for a client that gave no report.
        kill "$server" 2> /dev/null || true
    else
        sleep 4
        timeout 60 "${command[@]}" guest1 > "$DIR/writes" 2>&1 || grep "Can't produce a report" "$DIR/writes"
        vm-barrier writes-done
    fi
    cat "$DIR/writes"
    [ $(($(cat $counters/$counter) - before)) -ge $((200 * 16)) ]
}
# Where guest 2 cannot be reached, guest 1 fails; afterwards it succeeds.
unreachable() { # NAME, COMMAND that cuts, COMMAND that mends, GUEST who runs them
    [ "$VM_GUEST" != "$4" ] || $2
    vm-barrier "$1-cut"
    [ "$VM_GUEST" != 1 ] || refuses timeout 15 rping -c -a guest2 -C 1
    vm-barrier "$1-tried"
    [ "$VM_GUEST" != "$4" ] || $3
    vm-barrier "$1-mended"
    pings_next "$1"
}
clock_orders_a_ring() {
    "$CLOCK" ring --clock "$VERBFS_CLOCK" --member $((VM_GUEST - 1)) --members $MEMBERS --rounds $ROUNDS
}
# The same ring, over clocks that are each guest's own.
ring_finds_disorder() {
    local expect=order
    [ "$VM_GUEST" != 2 ] || expect=disorder
    "$CLOCK" ring --clock "$VERBFS_CLOCK" --member $((VM_GUEST - 1)) --members "$VM_GUESTS" --rounds 20 --source own \
        --from $((ROUNDS * MEMBERS)) --expect $expect || [ "$VM_GUEST" != 2 ]
}
clock_never_repeats() {
    "$CLOCK" hammer --clock "$VERBFS_CLOCK" --calls 20000 > "$VM_RESULTS/times"
    sort -c -n -u "$VM_RESULTS/times"
}
killed_and_started() {
    vm-control kill 3
    refuses timeout 15 rping -c -a guest3 -C 1
    vm-control start 3
    within 240 test -e "$VM_SHARED/back"
}

check ping_around 90 pings_next around
if [ "$VM_GUEST" = 3 ]; then vm-barrier writes-done; else check writes_between 120 writes_between; fi
check link_down_and_up 120 unreachable link "vm-link down" "vm-link up" 2
check unplugged_and_plugged 120 unreachable wire "vm-control unplug 2" "vm-control plug 2" 1

# A guest's own time of day is wrong: the time base must not care, and a ring over the guests' own clocks must show it.
[ "$VM_GUEST" != 2 ] || date -s "@$(($(date +%s) - 10))" > /dev/null
touch "$VM_SHARED/ring.$VM_GUEST"
check clock_orders_a_ring 120 clock_orders_a_ring
vm-barrier ring-done
check ring_finds_disorder 90 ring_finds_disorder
vm-barrier hammer
check clock_never_repeats 60 clock_never_repeats

vm-barrier kill
if [ "$VM_GUEST" = 1 ]; then
    vm-barrier said
    check killed_and_started 300 killed_and_started
fi
finish
if [ "$VM_GUEST" = 2 ]; then vm-barrier said; fi
if [ "$VM_GUEST" = 3 ]; then
    # What it passed is said; now it waits to be killed.
    vm-barrier said
    sleep 1000
fi
