#!/usr/bin/env bash
# Runs the steps listed in scripts/test-steps.txt, one after the other, to the end.
#
#   scripts/test.sh                 every step of the set `full` (make test)
#   scripts/test.sh --check         the fast subset (make check)
#   scripts/test.sh --only PATTERN  the steps whose names match a bash pattern, e.g. 'rdma' or 'fs*'
#   scripts/test.sh --list          name, limit, sets and command of every step
#
# A step has a time limit and a log, target/test-logs/NAME.log. A failing step does not stop the
# others; the last 60 lines of its log are shown. The summary table comes at the end, behind it one
# line `N passed, N failed`: tests counted in the logs, plus one failure for every step that failed
# without counting any. Exit status: 0 nothing failed, 1 something did, 2 wrong use, 130 interrupted.
#
# Nothing is left behind. Steps get a directory of their own in VERBFS_TEST_DIR (also TMPDIR) and an
# environment variable VERBFS_TEST_STEP that every process they start inherits: what still carries it
# when the step ends is ended, what is mounted below the directory is unmounted, and the step has failed.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=scripts/test-steps.txt
LOGS=${CARGO_TARGET_DIR:-target}/test-logs
TAIL_LINES=60         # lines of a failing log that are shown
GRACE=10              # seconds between asking a step to end and killing it
HEARTBEAT=60          # seconds between signs of life where there is no terminal
PATH=$PATH:${HOME:-/root}/.cargo/bin

usage() {
    sed -n '2,/^set -euo/ { /^#/ s/^# \{0,1\}//p }' "$0"
    exit "$1"
}
die() {
    printf 'test.sh: %s\n' "$*" >&2
    exit 2
}

set_wanted=full
pattern='*'
mode=run
while [ $# -gt 0 ]; do
    case $1 in
        --check) set_wanted=check ;;
        --only)
            [ $# -ge 2 ] || die "--only needs a pattern, for instance --only 'fs*'"
            pattern=$2
            set_wanted=any
            shift
            ;;
        --list) mode=list ;;
        -h | --help) usage 0 ;;
        *) die "unknown argument '$1'; see scripts/test.sh --help" ;;
    esac
    shift
done

# --- the list -----------------------------------------------------------------------------------
names=() limits=() commands=()
declare -A seen=()
listed_commands=
while IFS='|' read -r name limit sets command; do
    name=$(xargs <<<"$name")
    [[ -z $name || $name == \#* ]] && continue
    limit=$(xargs <<<"$limit") sets=$(xargs <<<"$sets")
    command=${command#"${command%%[![:space:]]*}"}
    [[ $limit =~ ^[0-9]+$ && -n $command ]] || die "$STEPS: step '$name' needs a limit in seconds and a command"
    [ -z "${seen[$name]:-}" ] || die "$STEPS: two steps are called '$name'"
    seen[$name]=yes
    listed_commands+=" $command"
    # shellcheck disable=SC2053 # the right side is meant as a pattern
    [[ $name == $pattern ]] || continue
    [[ $set_wanted == any || " $sets " == *" $set_wanted "* ]] || continue
    if [ "$mode" = list ]; then
        printf '%-18s %5s s  %-10s  %s\n' "$name" "$limit" "$sets" "$command"
    fi
    names+=("$name") limits+=("$limit") commands+=("$command")
done <"$STEPS"
[ "$mode" = list ] && exit 0
for script in scripts/steps/*.sh; do
    [ -e "$script" ] || continue
    [[ $(basename "$script") == lib*.sh || $listed_commands == *"$script"* ]] ||
        die "$script is not in $STEPS, so nothing would ever run it: add a line for it"
done
total=${#names[@]}
[ "$total" -gt 0 ] || die "no step matches '$pattern'; see scripts/test.sh --list"

# --- what this run starts, and ends -------------------------------------------------------------
mkdir -p "$LOGS"
LOGS=$(cd "$LOGS" && pwd)
run_id=$$-$(date +%s)
work=$(mktemp -d /tmp/verbfs-test.XXXXXX)
step_pid="" progress_pid="" marker=""

# Process ids that carry this step's marker: exactly what the step started.
strays() {
    local environ pid
    [ -n "$marker" ] || return 0
    for environ in /proc/[0-9]*/environ; do
        pid=${environ#/proc/}
        pid=${pid%/environ}
        # A zombie has no environment; sccache's server is a cache, not a leftover.
        if tr '\0' '\n' <"$environ" 2>/dev/null | grep -qxF "VERBFS_TEST_STEP=$marker"; then
            [[ $(cat "/proc/$pid/comm" 2>/dev/null) == sccache* ]] || echo "$pid"
        fi
    done 2>/dev/null
}

# Mounts below this run's directory, the innermost first.
mounts() {
    awk -v below="$work/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | sort -r
}

# Ends processes and mounts of the step; says on standard output what there was.
sweep() {
    local left pid mount waited
    left=$(strays)
    for mount in $(mounts); do
        echo "was still mounted: $mount"
        umount "$mount" 2>/dev/null || umount -l "$mount" 2>/dev/null || echo "could not unmount $mount"
    done
    if [ -n "$left" ]; then
        for pid in $left; do
            echo "was still running: $pid $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)"
            kill -TERM "$pid" 2>/dev/null || true
        done
        for ((waited = 0; waited < 20; waited++)); do
            [ -n "$(strays)" ] || break
            sleep 0.1
        done
        for pid in $(strays); do kill -KILL "$pid" 2>/dev/null || true; done
    fi
}

stop_progress() {
    [ -z "$progress_pid" ] && return 0
    kill "$progress_pid" 2>/dev/null || true
    wait "$progress_pid" 2>/dev/null || true
    progress_pid=
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

finish() {
    trap - EXIT INT TERM HUP
    stop_progress
    if [ -n "$step_pid" ]; then
        kill -TERM "$step_pid" 2>/dev/null || true
        wait "$step_pid" 2>/dev/null || true
    fi
    sweep
    rm -rf --one-file-system "$work"
}
trap finish EXIT
trap 'echo; echo "interrupted" >&2; exit 130' INT TERM HUP

# One live line on a terminal; elsewhere a sign of life every minute.
progress() {
    local label=$1 limit=$2 log=$3 start=$SECONDS line columns never
    trap - EXIT INT TERM HUP
    # Waiting on a pipe that nobody writes: a `sleep` would outlive this process and hold our output open.
    exec {never}<> <(:)
    pause() { read -rt "$1" -u "$never" || true; }
    if [ -t 1 ]; then
        while pause 0.5; do
            columns=$(tput cols 2>/dev/null || echo 100)
            line=$(tail -c 400 "$log" 2>/dev/null | tr '\r\t' '\n ' | grep -v '^ *$' | tail -n 1 | tr -cd '[:print:]' || true)
            line="$label  $((SECONDS - start)) s of $limit  $line"
            printf '\r\033[K%s' "${line:0:columns-1}"
        done
    else
        while pause $HEARTBEAT; do
            printf '%s  still running, %d s of %d\n' "$label" $((SECONDS - start)) "$limit"
        done
    fi
}

# Sums the tests that a log counts: sets `passed` and `failed`.
count() {
    read -r passed failed < <(awk '
        /^test result: / { for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) p += $(i - 1); if ($i ~ /^failed/) f += $(i - 1) } }
        /^[0-9]+ passed, [0-9]+ failed$/ { p += $1; f += $3 }
        END { print p + 0, f + 0 }' "$1")
}

# --- run ----------------------------------------------------------------------------------------
results=() seconds=() counts=()
all_passed=0 all_failed=0 failed_steps=0 run_start=$SECONDS
for ((i = 0; i < total; i++)); do
    name=${names[i]} limit=${limits[i]} log=$LOGS/${names[i]}.log
    label="[$((i + 1))/$total] $name"
    marker=$run_id-$i
    mkdir -p "$work/$name"
    : >"$log"
    [ -t 1 ] || printf '%s  ...\n' "$label"
    start=$SECONDS
    # Background jobs of a script ignore SIGINT and pass that on; steps that test it need the default.
    env --default-signal=INT,QUIT VERBFS_TEST_STEP="$marker" VERBFS_TEST_DIR="$work/$name" TMPDIR="$work/$name" \
        timeout --kill-after=$GRACE "$limit" bash -euo pipefail -c "${commands[i]}" </dev/null >"$log" 2>&1 &
    step_pid=$!
    progress "$label" "$limit" "$log" &
    progress_pid=$!
    status=0
    wait "$step_pid" || status=$?
    step_pid=
    stop_progress
    took=$((SECONDS - start))
    left=$(sweep)
    rm -rf --one-file-system "${work:?}/$name"
    count "$log"
    case $status in
        0) result=ok ;;
        124 | 137)
            if [ $took -ge "$limit" ]; then result="time limit"; else result="exit $status"; fi
            ;;
        *) result="exit $status" ;;
    esac
    if [ -n "$left" ]; then
        printf '\nleft behind by the step, and ended:\n%s\n' "$left" >>"$log"
        [ "$result" = ok ] && result=leftovers
    fi
    [ "$result" = ok ] && [ "$failed" -gt 0 ] && result="failed tests"
    if [ "$result" != ok ]; then
        failed_steps=$((failed_steps + 1))
        [ "$failed" -gt 0 ] || failed=1
    fi
    all_passed=$((all_passed + passed)) all_failed=$((all_failed + failed))
    results+=("$result") seconds+=("$took") counts+=("$passed $failed")
    printf '%s  %s  %d s  %d passed, %d failed\n' "$label" "$result" "$took" "$passed" "$failed" | sed 's/  0 passed, 0 failed$//'
    if [ "$result" != ok ]; then
        printf -- '--- the last %d lines of %s\n' $TAIL_LINES "$log"
        tail -n $TAIL_LINES "$log"
        printf -- '--- end of %s\n' "$log"
    fi
done

# --- summary ------------------------------------------------------------------------------------
printf '\n%-20s %8s %8s %8s  %s\n' step seconds passed failed result
printf '%s\n' '------------------------------------------------------------'
for ((i = 0; i < total; i++)); do
    read -r passed failed <<<"${counts[i]}"
    printf '%-20s %8d %8d %8d  %s\n' "${names[i]}" "${seconds[i]}" "$passed" "$failed" "${results[i]}"
done
printf '%s\n' '------------------------------------------------------------'
printf '%-20s %8d %8d %8d  %s\n' "total" $((SECONDS - run_start)) "$all_passed" "$all_failed" \
    "$([ $failed_steps -eq 0 ] && echo ok || echo "$failed_steps of $total steps failed")"
printf 'logs: %s\n\n' "$LOGS"
printf '%d passed, %d failed\n' "$all_passed" "$all_failed"
[ "$all_failed" -eq 0 ]
