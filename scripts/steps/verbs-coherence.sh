#!/usr/bin/env bash
# The coherence suite, both exercisers and fio's verification over SoftRoCE: three daemons in one virtual machine, then one in
# each of three, whose clients' histories are joined and judged here. (Stock mounts of Linux 6.1 have no shared mappings.)
#
#   SEEDS='1 2 3'   more seeds than one       OPERATIONS=N JOINED_OPERATIONS=N   calls of each family in one guest, in three
#   GUESTS='1 3'    which of the two          EXERCISES=N                        operations of each exerciser
#   LIMIT=SECONDS   for the guests of each run; it wants more when there is more to do
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=$(realpath "${BIN:-${CARGO_TARGET_DIR:-target}/release}")
VERBFS=$(realpath "${VERBFS:-$BIN/verbfs}")
DIR=${VERBFS_TEST_DIR:?run this by scripts/test.sh, or set VERBFS_TEST_DIR to an empty directory}
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

SEEDS=${SEEDS:-1}
OPERATIONS=${OPERATIONS:-800}
JOINED_OPERATIONS=${JOINED_OPERATIONS:-300}
EXERCISES=${EXERCISES:-80}
# Five times what a quiet host of two processors needs: emulation on a loaded one is slow.
LIMIT=${LIMIT:-800}
CHECK_LIMIT=${CHECK_LIMIT:-300}
environment=(env "VERBFS=$VERBFS" "BIN=$BIN" "SEEDS=$SEEDS" "OPERATIONS=$OPERATIONS" "JOINED_OPERATIONS=$JOINED_OPERATIONS"
    "EXERCISES=$EXERCISES" "CHECK_LIMIT=$CHECK_LIMIT")

# guests NAME OPTIONS... -- COMMAND...: runs them, and counts what they said of their own checks.
guests() {
    local name=$1 status=0 line
    shift
    tests/vm/run.sh --results "$DIR/$name" --limit "$LIMIT" "$@" > "$DIR/$name.log" 2>&1 || status=$?
    while IFS= read -r line; do
        case $line in
            ok\ *) pass "${line#ok      }" ;;
            FAILED\ *) fail "${line#FAILED  }" 'see below' ;;
        esac
    done < <(cat "$DIR/$name"/[1-9]/output)
    if [ $status = 0 ]; then
        pass "$name: the guests end well"
    else
        fail "$name: the guests end well" "exit status $status"
        sed -E 's/^(([1-9]: )?[0-9]+ passed)/... \1/' "$DIR/$name.log"
        # A failed step's directory does not stay.
        tail -n 40 "$DIR/$name"/*/dmesg.log
    fi
}

# joined FAMILY SEED [OPTIONS]: one history of what the three guests saved.
joined() {
    local family=$1 seed=$2 part histories=()
    shift 2
    for part in 0 1 2; do
        histories+=(--check "$DIR/three-guests/shared/meeting-$seed/$family-$seed-calls.history.$part")
    done
    "$BIN/verbfs-coherence" "${histories[@]}" "$@"
}
judged() {
    local across
    joined "$@" | tee "$DIR/judged"
    # Guests that took turns would prove nothing.
    across=$(grep -o '[0-9]* one of another mount' "$DIR/judged" | cut -d' ' -f1)
    [ "$across" -gt $((JOINED_OPERATIONS / 10)) ] || { echo "only $across calls overlapped calls of another guest"; return 1; }
}
stale_read_is_rejected() {
    local status=0
    joined data "$1" --inject-stale-read --seed 7 || status=$?
    same 'exit status' 1 $status
}

if [[ " ${GUESTS:-1 3} " == *' 1 '* ]]; then
    # shellcheck disable=SC2016 # the variables are the guest's
    guests one-guest --memory 2G -- "${environment[@]}" bash -c '
        modprobe fuse
        export ADDRESS=$VM_ADDRESS VERBFS_TEST_DIR=/tmp/cluster
        mkdir "$VERBFS_TEST_DIR"
        exec scripts/steps/lib/verbs-coherence-cluster.sh'
fi
if [[ " ${GUESTS:-1 3} " == *' 3 '* ]]; then
    guests three-guests --guests 3 --memory 1G -- "${environment[@]}" scripts/steps/lib/verbs-coherence-hosts.sh
    for seed in $SEEDS; do
        for family in data names locks; do check "three_guests_${family}_$seed" 60 judged $family "$seed"; done
    done
    check three_guests_stale_read_is_rejected 30 stale_read_is_rejected "${SEEDS%% *}"
fi
finish
