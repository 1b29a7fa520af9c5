#!/usr/bin/env bash
# Are the checks awake? One safeguard of the daemons is switched off at a time; the coherence suite must notice. A safeguard whose
# absence goes unnoticed in all seeds fails the step.
set -euo pipefail
cd "$(dirname "$0")/../.."

export VERBFS_ALLOW_MUTATIONS=1
# Each with the family that should notice, and why it should.
MUTATIONS='
keep_pages_after_revoke      data   reads of pages that others have changed since
no_write_back_before_release data   what was written is not home when the next holder reads
size_floor_never_capped      data   reads beyond an end of file that another node has moved
hand_over_drops_dirty        data   the last holder of a page forgets what the one before had written
append_without_exclusive     data   two appends at one offset
stat_without_glimpse         data   sizes that are no longer
names_kept_after_revoke      names  names that are no longer
no_kernel_invalidation       mmap   loads of what others have stored over
'
passed=0
failed=0
while read -r mutation family why; do
    [ -n "$mutation" ] || continue
    noticed=
    export VERBFS_MUTATION=$mutation
    VERBFS_TEST_DIR=$(mktemp -d "${VERBFS_TEST_DIR:?}/$mutation-XXXX") bash -c '
        set -uo pipefail
        source scripts/steps/lib.sh
        start_cluster > /dev/null || exit 9
        for seed in 1 2 3 4 5 6 7 8; do
            timeout 90 "$BIN/verbfs-coherence" "${MOUNTS[@]}" --seed "$seed" --operations 1500 --families "$0" \
                --stall-seconds 15 > "$DIR/coherence.log" 2>&1
            case $? in
                0) ;;
                1 | 2 | 124) echo "$seed"; exit 0 ;;
                *) tail -5 "$DIR/coherence.log" >&2; exit 9 ;;
            esac
        done
        exit 8
    ' "$family" > "$VERBFS_TEST_DIR/noticed" && noticed=$(cat "$VERBFS_TEST_DIR/noticed") || status=$?
    if [ -n "$noticed" ]; then
        echo "ok $mutation: noticed at seed $noticed ($why)"
        passed=$((passed + 1))
    else
        echo "FAIL $mutation: not noticed (status ${status:-?})"
        failed=$((failed + 1))
    fi
done <<< "$MUTATIONS"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
