#!/usr/bin/env bash
# The demonstration runs to its end without a terminal, and leaves nothing, also when it is ended in the middle.
set -euo pipefail

VERBFS=${VERBFS:-${CARGO_TARGET_DIR:-target}/release/verbfs}
DIR=${VERBFS_TEST_DIR:?run this by scripts/test.sh, or set VERBFS_TEST_DIR to an empty directory}
export TMPDIR=$DIR
bad=0
complain() {
    printf 'demo: %s\n' "$*" >&2
    bad=1
}

# A daemon is known by the path of its mount, below our directory, on its command line.
nothing_left() {
    local left
    if left=$(grep -F " $DIR/verbfs-demo-" /proc/self/mounts); then complain "$1: mounted: $left"; fi
    if left=$(pgrep -a -f -- "--mount $DIR/verbfs-demo-"); then complain "$1: running: $left"; fi
    left=$(find "$DIR" -maxdepth 1 -name 'verbfs-demo-*')
    [ -z "$left" ] || complain "$1: files: $left"
    left=$(comm -13 "$DIR/before" <(stores))
    [ -z "$left" ] || complain "$1: files: $left"
}
stores() { find /dev/shm -maxdepth 1 -name 'verbfs-demo-*' 2> /dev/null | sort; }
stores > "$DIR/before"

echo "--- to the end"
"$VERBFS" demo < /dev/null > "$DIR/demo.out" 2> "$DIR/demo.err" || complain "exit status $?"
cat "$DIR/demo.out" "$DIR/demo.err"
grep -q '^nothing is left' "$DIR/demo.out" || complain "it does not say that it reached its end"
grep -q 'What the locks did' "$DIR/demo.out" || complain "it does not show what the locks did"
[ ! -s "$DIR/demo.err" ] || complain "it wrote to standard error"
nothing_left "after the end"

echo "--- ended while it unpacks"
"$VERBFS" demo < /dev/null > "$DIR/interrupted.out" 2>&1 &
demo=$!
for ((tries = 0; tries < 600; tries++)); do
    if grep -q 'mounts answer' "$DIR/interrupted.out"; then break; fi
    sleep 0.1
done
sleep 1
kill -TERM "$demo"
status=0
wait "$demo" || status=$?
cat "$DIR/interrupted.out"
[ "$status" = 1 ] || complain "exit status $status instead of 1"
grep -q 'interrupted' "$DIR/interrupted.out" || complain "it does not say that it was interrupted"
nothing_left "after SIGTERM"

if [ "$bad" = 0 ]; then echo "1 passed, 0 failed"; else echo "0 passed, 1 failed"; fi
exit "$bad"
