#!/usr/bin/env bash
# The virtual machines as a test bed: guests boot with SoftRoCE, reach each other, share a time base, and each way to fail is told.
#
# ONLY=PATTERN restricts the checks of this script, not those inside guests.
set -euo pipefail
cd "$(dirname "$0")/../.."
DIR=${VERBFS_TEST_DIR:?run this by scripts/test.sh, or set VERBFS_TEST_DIR to an empty directory}
BIN=${BIN:-${CARGO_TARGET_DIR:-target}/release}
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh
# shellcheck source=tests/vm/lib.sh
. tests/vm/lib.sh
CLOCK=$(realpath "$BIN/verbfs-vm-clock")

wanted() {
    # shellcheck disable=SC2053 # meant as a pattern
    [[ $1 == ${ONLY:-*} ]]
}
# expect NAME EXPECTED FOUND LOG
expect() {
    if [ "$2" = "$3" ]; then pass "$1"; else fail "$1" "expected '$2', found '$3'; $(tail -20 "$4")"; fi
}
# Counts what guests said of their own checks; $3 is how many closing lines there must be.
from_guests() { # NAME, DIR, COUNT
    local line closing
    while IFS= read -r line; do
        case $line in
            ok\ *) pass "$1: ${line#ok      }" ;;
            FAILED\ *) fail "$1: ${line#FAILED  }" "see below" ;;
        esac
    done < <(cat "$2"/[1-9]/output*)
    closing=$(cat "$2"/[1-9]/output* | grep -cE '^[0-9]+ passed, [0-9]+ failed$' || true)
    expect "$1: all guests came to their end" "$3" "$closing" "$2.log"
    if grep -q '^FAILED' "$2"/[1-9]/output*; then sed -E 's/^([0-9]+ passed)/... \1/' "$2.log"; fi
}

# --- how consoles are judged ---------------------------------------------------------------------
consoles() {
    local line bad good
    bad=(
        '[    3.141592] WARNING: CPU: 1 PID: 99 at drivers/infiniband/sw/rxe/rxe_qp.c:123 rxe_qp_do_cleanup+0x1/0x2 [rdma_rxe]'
        '[    3.141592][  T99] WARNING: possible circular locking dependency detected'
        '[    3.141592] WARNING: suspicious RCU usage'
        '[    3.141592] BUG: kernel NULL pointer dereference, address: 0000000000000008'
        '[    3.141592] BUG: unable to handle page fault for address: ffffffffdeadbeef'
        '[    3.141592] BUG: sleeping function called from invalid context at mm/slab.h:1'
        '[    3.141592] kernel BUG at fs/fuse/dev.c:1!'
        '[    3.141592] Oops: 0002 [#1] PREEMPT SMP NOPTI'
        '[    3.141592] general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1]'
        '[    3.141592] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:'
        '[    3.141592] rcu: INFO: rcu_preempt self-detected stall on CPU'
        '[    3.141592] watchdog: BUG: soft lockup - CPU#0 stuck for 67s! [verbfs:77]'
        '[    3.141592] NMI watchdog: Watchdog detected hard LOCKUP on cpu 0'
        '[    3.141592] INFO: task verbfs:77 blocked for more than 120 seconds.'
        '[    3.141592] INFO: lockdep is turned off.'
        '[    3.141592] UBSAN: array-index-out-of-bounds in net/core/dev.c:1:1'
        '[    3.141592] list_del corruption. next->prev should be ffff, but was 0000'
        '[    3.141592] refcount_t: underflow; use-after-free.'
        '[    3.141592] unregister_netdevice: waiting for eth0 to become free. Usage count = 2'
        '[    3.141592] Out of memory: Killed process 77 (verbfs)'
        '[    3.141592] verbfs invoked oom-killer: gfp_mask=0x1'
        '[    3.141592] traps: verbfs[77] general protection fault ip:5555 sp:7fff error:0'
        '[    3.141592] Kernel panic - not syncing: sysrq triggered crash'
        '<4>[    3.141592] WARNING: CPU: 1 PID: 99 at kernel/fork.c:1'
    )
    good=(
        '[    0.005817] Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on'
        '[    0.016508] NMI watchdog: Perf NMI watchdog permanently disabled'
        '[    0.000000] rcu: RCU calculated value of scheduler-enlistment delay is 25 jiffies.'
        '[    3.141592] eth0 speed is unknown, defaulting to 1000'
        '[    3.141592] verbfs-vm: the command ended with 9'
        '[    3.141592] systemd-udevd[77]: this mentions a WARNING: and a BUG: in passing'
    )
    for line in "${bad[@]}"; do
        printf 'first\r\n%s\r\nlast\r\n' "$line" > "$DIR/sample"
        vm_bad_lines "$DIR/sample" > /dev/null || { echo "not seen: $line"; return 1; }
    done
    for line in "${good[@]}"; do
        printf 'first\r\n%s\r\nlast\r\n' "$line" > "$DIR/sample"
        refuses vm_bad_lines "$DIR/sample"
    done
    printf '%s\n' "${bad[0]}" > "$DIR/sample"
    refuses vm_bad_lines "$DIR/sample" 'rxe_qp_do_cleanup'
    vm_bad_lines "$DIR/sample" 'another_function'
}

# --- what is missing is said ---------------------------------------------------------------------
says_what_is_missing() {
    local said status=0
    # A PATH with nothing but what the script itself uses.
    mkdir -p "$DIR/few"
    for program in bash dirname realpath basename sort grep dpkg-query; do ln -sf "$(command -v "$program")" "$DIR/few/"; done
    said=$(CARGO_TARGET_DIR=$DIR/nothing PATH=$DIR/few tests/vm/prepare.sh --missing 2>&1) || status=$?
    echo "$said"
    same 'exit status' 3 $status
    [[ $said == *qemu-system-x86* && $said == *"apt-get install"* && $said == *"kernel is not unpacked"* ]]
}

# --- nothing is left behind ----------------------------------------------------------------------
none_left() { refuses pgrep -f "$DIR/left/run/clock"; }
qemu_runs() { pgrep -f "qemu-system-x86_64.*$DIR/left/run/clock" > /dev/null; }
leaves_nothing() { # SIGNAL
    local pid
    tests/vm/run.sh --guests 2 --results "$DIR/left" true &
    pid=$!
    within 60 qemu_runs
    kill "-$1" "$pid"
    wait "$pid" || true
    within 10 none_left
}

# --- runs ----------------------------------------------------------------------------------------
one() {
    local status=0
    tests/vm/run.sh --limit 240 --results "$DIR/one" tests/vm/selftest/one.sh > "$DIR/one.log" 2>&1 || status=$?
    expect "one: the command's status is passed on" 9 $status "$DIR/one.log"
    from_guests one "$DIR/one" 1
    expect "one: its results stay" "written by guest 1" "$(cat "$DIR/one/1/note" 2>&1)" "$DIR/one.log"
    expect "one: shared results stay" "shared by guest 1" "$(cat "$DIR/one/shared/note" 2>&1)" "$DIR/one.log"
    echo "one guest: $(grep -ao 'ready after .*' "$DIR/one/1/console")"
}
not_up() {
    local status=0
    tests/vm/run.sh --boot-limit 2 --results "$DIR/not-up" true > "$DIR/not-up.log" 2>&1 || status=$?
    expect "not_up: a guest that does not come up is told" 125 $status "$DIR/not-up.log"
}
failing() {
    local status=0 log=$DIR/failing.log
    tests/vm/run.sh --guests 4 --memory 512M --independent --limit 50 --results "$DIR/failing" \
        tests/vm/selftest/failing.sh > "$log" 2>&1 || status=$?
    expect "failing: a panic is told" "121 the kernel panicked" "$(cat "$DIR/failing/1/verdict")" "$log"
    expect "failing: a command that hangs is told" "124 the command did not end within 50 s" "$(cat "$DIR/failing/2/verdict")" "$log"
    expect "failing: a warning is told" "120 the kernel complained" "$(cat "$DIR/failing/3/verdict")" "$log"
    expect "failing: a power-off is told" "121 the guest ended before the command did" "$(cat "$DIR/failing/4/verdict")" "$log"
    expect "failing: the warning is shown" 1 "$(grep -c '^    .*WARNING: CPU: 0 PID: .* made up' "$log")" "$log"
    expect "failing: the blocked task is shown" yes "$(grep -q '^    .*INFO: task touch:.* blocked for more than' "$log" && echo yes)" "$log"
    case $status in
        120 | 121) pass "failing: the run fails" ;;
        *) fail "failing: the run fails" "exit status $status" ;;
    esac
}
three() {
    local status=0 log=$DIR/three.log run host=0
    tests/vm/run.sh --guests 3 --memory 1G --limit 420 --results "$DIR/three" \
        tests/vm/selftest/three.sh "$CLOCK" > "$log" 2>&1 &
    run=$!
    # The host takes part in the ring, as soon as the guests do.
    while kill -0 $run 2> /dev/null; do
        if [ -e "$DIR/three/shared/ring.1" ] && [ -e "$DIR/three/shared/ring.2" ] && [ -e "$DIR/three/shared/ring.3" ]; then
            "$CLOCK" ring --clock "$DIR/three/run/clock" --member 3 --members 4 --rounds 200 || host=$?
            break
        fi
        sleep 0.2
    done
    wait $run || status=$?
    expect "three: the run ends well" 0 $status "$log"
    expect "three: the host's place in the ring" 0 $host "$log"
    from_guests three "$DIR/three" 4
    expect "three: a kill that was asked for is no failure" "0 the command returned 0" "$(cat "$DIR/three/3/verdict")" "$log"
    expect "three: no time was given twice" "60000" "$(sort -n -u "$DIR"/three/[123]/times | wc -l)" "$log"
    grep -h '^member' "$DIR"/three/[123]/output || true
}

check prepared 600 tests/vm/prepare.sh
check consoles 60 consoles
check says_what_is_missing 30 says_what_is_missing
check leaves_nothing_when_ended 90 leaves_nothing TERM
check leaves_nothing_when_killed 90 leaves_nothing KILL
for run in not_up one failing three; do
    if wanted $run; then $run; fi
done
finish
