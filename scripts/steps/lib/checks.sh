# shellcheck shell=bash
# Named checks with a time limit each, for the system steps. Sourced by scripts/steps/*.sh behind lib.sh.
#
#   check NAME SECONDS FUNCTION ARGUMENTS...   runs the function in a shell of its own that ends at the first error
#   pass NAME; fail NAME REASON                for what has to run in the step's own shell
#   finish                                     the closing line; its status is the step's
#
# Everything that touches a mount goes through `check`: a call that hangs then costs its limit, and the failure says
# where the processes hung. ONLY=PATTERN restricts a run to the checks whose names match.

PASSED=0
FAILED=0
FAILED_NAMES=()

pass() {
    PASSED=$((PASSED + 1))
    echo "ok      $1"
}

fail() {
    FAILED=$((FAILED + 1))
    FAILED_NAMES+=("$1")
    echo "FAILED  $1: $2"
    local log
    for log in "$DIR"/node*.log; do
        if [ -s "$log" ]; then
            echo "--- $(basename "$log"), its last warnings"
            grep -E 'WARN|ERROR|panicked' "$log" | tail -5 || true
        fi
    done
}

# Where each process of group $1 waits in the kernel.
show_waiting() {
    local pid
    for pid in $(ps -o pid= --ppid "$1" -g "$1" 2> /dev/null | sort -u); do
        echo "  $pid $(tr '\0' ' ' < "/proc/$pid/cmdline" 2> /dev/null | cut -c 1-120): $(cat "/proc/$pid/wchan" 2> /dev/null)"
    done
}

check() {
    local name=$1 limit=$2 started=$SECONDS pid status=0 log=$DIR/check.log
    shift 2
    # shellcheck disable=SC2053 # meant as a pattern
    [[ $name == ${ONLY:-*} ]] || return 0
    # A process group of its own, so that all of it can be ended.
    set -m
    (
        set -euo pipefail
        "$@"
    ) > "$log" 2>&1 < /dev/null &
    pid=$!
    set +m
    while kill -0 "$pid" 2> /dev/null; do
        if [ $((SECONDS - started)) -ge "$limit" ]; then
            { echo "took longer than $limit s:"; show_waiting "$pid"; } >> "$log"
            kill -KILL -- "-$pid" 2> /dev/null || true
            break
        fi
        sleep 0.05
    done
    wait "$pid" 2> /dev/null || status=$?
    if [ $status = 0 ]; then
        pass "$name ($((SECONDS - started)) s)"
    else
        fail "$name" "exit status $status; what it said:"
        uniq "$log" | tail -25 | sed 's/^/    /'
    fi
    return 0
}

# same WHAT EXPECTED FOUND: complains and fails when they differ.
same() {
    [ "$2" = "$3" ] || { echo "$1: expected '$2', found '$3'"; return 1; }
}

# refuses COMMAND...: succeeds when the command fails.
refuses() {
    if "$@"; then echo "succeeded, and should not have: $*"; return 1; fi
}

# within SECONDS COMMAND...: tries until the command succeeds.
within() {
    local limit=$1 started=$SECONDS
    shift
    until "$@"; do
        [ $((SECONDS - started)) -lt "$limit" ] || { echo "not within $limit s: $*"; return 1; }
        sleep 0.2
    done
}

alive() {
    local slot
    for slot in "${!DAEMON[@]}"; do
        kill -0 "${DAEMON[$slot]}" 2> /dev/null || { echo "the daemon of slot $slot has ended"; return 1; }
    done
}

finish() {
    [ "$FAILED" = 0 ] || printf 'failed: %s\n' "${FAILED_NAMES[@]}"
    echo "$PASSED passed, $FAILED failed"
    [ "$FAILED" = 0 ]
}

# Lets other users of this host search the way to the mounts: checks of permissions pose as them.
open_way() {
    local directory=$DIR/mnt
    while [ "$directory" != / ] && [ -O "$directory" ]; do
        [[ $(stat -c %A "$directory") == *x ]] || [[ $(stat -c %A "$directory") == *t ]] || chmod o+x "$directory"
        directory=$(dirname "$directory")
    done
}
