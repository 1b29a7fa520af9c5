#!/usr/bin/env bash
# What was acknowledged outlives daemons: kill -9 of a holder of pages, and of each node while all write.
# While one is dead, what needs it ends with EIO in bounded time, and what does not need it goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
PEER_TIMEOUT=3s
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

# A call that needs a dead node: the time-out for the peer, once for it as home and once for its locks, and some air.
LIMIT=10
HELPER=$BIN/verbfs-durability

kill_node() {
    echo "kill -9 of node $1"
    kill -KILL "${DAEMON[$1]}"
    wait "${DAEMON[$1]}" 2> /dev/null || true
    unset "DAEMON[$1]"
    umount -l "$DIR/mnt/$1" 2> /dev/null || true
}
restart_node() {
    start_node "$1"
    wait_for_node "$1"
}

home_of() { echo $(($(stat -c %i "$1") >> 48)); }

# A directory for each home: d0, d1, d2. New directories go where their names hash to.
make_directories() {
    local slot n
    for ((n = 0; n < 100; n++)); do
        mkdir "$DIR/mnt/0/try$n"
        slot=$(home_of "$DIR/mnt/0/try$n")
        if [ -e "$DIR/mnt/0/d$slot" ]; then rmdir "$DIR/mnt/0/try$n"; else mv "$DIR/mnt/0/try$n" "$DIR/mnt/0/d$slot"; fi
        if [ -d "$DIR/mnt/0/d0" ] && [ -d "$DIR/mnt/0/d1" ] && [ -d "$DIR/mnt/0/d2" ]; then break; fi
    done
    for slot in 0 1 2; do same 'home' $slot "$(home_of "$DIR/mnt/1/d$slot")"; done
}

# take_page FILE LETTER OFFSET: bytes into a page, without fsync.
put() { printf '%s' "$2" | dd of="$1" bs=1 seek="$3" conv=notrunc status=none; }

# The dirty page of a file moves from node $1 to node $2 and is fsynced by node $1; node $2 dies.
# The file's home is $3.
moved_page_prepare() {
    local a=$DIR/mnt/$1/d$3/moved-$1-$2-$3 b=$DIR/mnt/$2/d$3/moved-$1-$2-$3 n
    put "$a" AAAA 0
    put "$b" BBBB 100
    put "$a" CCCC 200
    put "$b" DDDD 300
    # Further pages, the last one of them far away, on another node.
    for n in 1 2 3; do put "$a" "a$n" $((n * 4096)); put "$b" "b$n" $((n * 4096 + 50)); done
    put "$b" FAR $((2 * 1048576 + 7))
    sync "$a"
}
moved_page_verify() {
    local file=$DIR/mnt/$1/d$3/moved-$2-$4-$3
    at() { dd if="$file" bs=1 skip="$1" count="$2" status=none; }
    same 'written by A first' AAAA "$(at 0 4)"
    same 'written by B' BBBB "$(at 100 4)"
    same 'written by A again' CCCC "$(at 200 4)"
    same 'written by B last' DDDD "$(at 300 4)"
    local n
    for n in 1 2 3; do same "page $n" "a$n b$n" "$(at $((n * 4096)) 2) $(at $((n * 4096 + 50)) 2)"; done
    same 'on another node' FAR "$(at $((2 * 1048576 + 7)) 3)"
}

start_writers() { # one for each mount and home
    local mount home tag
    rm -f "$DIR/stop"
    WRITERS=()
    for mount in 0 1 2; do
        for home in 0 1 2; do
            tag=w$1-$mount-$home
            "$HELPER" write --directory "$DIR/mnt/$mount/d$home" --tag "$tag" --journal "$DIR/$tag.journal" --stop "$DIR/stop" --limit $LIMIT \
                > "$DIR/$tag.out" 2>&1 &
            WRITERS+=($!)
        done
    done
}
writers_end() {
    touch "$DIR/stop"
    local pid
    for pid in "${WRITERS[@]}"; do
        within $((LIMIT + 5)) bash -c "! kill -0 $pid 2> /dev/null || grep -q '^State:.Z' /proc/$pid/status"
    done
}
verify_writers() { # victim, and the mount to look through
    local mount home tag bad=0
    for mount in 0 1 2; do
        for home in 0 1 2; do
            tag=w$1-$mount-$home
            "$HELPER" verify --directory "$DIR/mnt/$2/d$home" --journal "$DIR/$tag.journal" || bad=1
        done
    done
    cat "$DIR"/w"$1"-*.out
    return $bad
}

# ends ERRNO-TEXT COMMAND...: fails as it should, in time.
fails_in_time() {
    local text=$1 began=$SECONDS output status=0
    shift
    output=$(LC_ALL=C timeout -k 1 $((LIMIT + 20)) "$@" 2>&1) || status=$?
    echo "$*: status $status after $((SECONDS - began)) s: ${output:0:160}"
    [ $((SECONDS - began)) -le $LIMIT ] || return 1
    [ $status != 0 ] && [[ $output == *"$text"* ]]
}
works_in_time() {
    local began=$SECONDS
    timeout -k 1 $((LIMIT + 20)) "$@" || { echo "failed after $((SECONDS - began)) s: $*"; return 1; }
    [ $((SECONDS - began)) -le $LIMIT ] || { echo "took $((SECONDS - began)) s: $*"; return 1; }
}
# Directories by descriptor: the path to them leads through the root, whose home may be the dead node.
open_directories() {
    # shellcheck disable=SC2034
    exec {D0}< "$DIR/mnt/$1/d0" {D1}< "$DIR/mnt/$1/d1" {D2}< "$DIR/mnt/$1/d2"
}
close_directories() { exec {D0}<&- {D1}<&- {D2}<&-; }
while_dead_needs() { # victim
    local at="/proc/self/fd/$2"
    fails_in_time 'Input/output error' stat "$at/known"
    fails_in_time 'Input/output error' cat "$at/known"
    fails_in_time 'Input/output error' touch "$at/new$1"
    fails_in_time 'Input/output error' ls -l "$at/"
    fails_in_time 'Input/output error' mv "$at/known" "$at/other"
    fails_in_time 'Input/output error' dd if=/dev/zero of="$at/known" bs=4k count=1 conv=notrunc,fsync
    fails_in_time 'Input/output error' mkdir "$at/newdir$1"
    fails_in_time '' "$HELPER" take "$at/known" --limit 1
}
# Many at once must not queue up one time-out behind the other.
while_dead_many() {
    local n pids=() began=$SECONDS
    for n in {1..20}; do (refuses timeout 60 stat "/proc/self/fd/$2/many$n" 2> /dev/null) & pids+=($!); done
    for n in "${pids[@]}"; do wait "$n"; done
    echo "20 calls took $((SECONDS - began)) s"
    [ $((SECONDS - began)) -le $LIMIT ]
}
while_dead_goes_on() { # victim, other homes' directories by descriptor
    local at
    shift
    for at in "$@"; do
        at=/proc/self/fd/$at
        works_in_time cat "$at/known" > /dev/null
        works_in_time dd if=/dev/zero of="$at/on$1" bs=4k count=20 conv=fsync status=none
        works_in_time ls -l "$at/" > /dev/null
        works_in_time mv "$at/on$1" "$at/on2"
        works_in_time rm "$at/on2"
        works_in_time "$HELPER" take "$at/known" --limit 5
    done
}

serves_again() {
    local slot home value=$RANDOM
    for slot in 0 1 2; do
        for home in 0 1 2; do
            within 15 bash -c "echo $value$slot > '$DIR/mnt/$slot/d$home/again'"
            same "d$home through $(((slot + 1) % 3))" "$value$slot" "$(cat "$DIR/mnt/$(((slot + 1) % 3))/d$home/again")"
            rm "$DIR/mnt/$(((slot + 2) % 3))/d$home/again"
        done
    done
    "$BIN/verbfs-exerciser" --mount "$DIR/mnt/0" --mount "$DIR/mnt/1" --mount "$DIR/mnt/2" --seed 5 --operations 200 --max-size 1500000 --no-mmap
}
locks_freed() { # another mount
    local home
    for home in 0 1 2; do
        "$HELPER" take "$DIR/mnt/$1/d$home/locked" --limit 15
        within 15 flock -n "$DIR/mnt/$1/d$home/flocked" true
    done
}

# A node dies that stores pages another node is just writing back, in a hole of a file whose home lives: they are lost, the writer's
# next fsync says so, once, and the writer is as well as before. The writer is node 0, the storing node 1, the home 2.
lost_pages_prepare() {
    local chunk
    truncate -s 8M "$1"
    sync "$1"
    # One of these is stored on node 1.
    for chunk in 0 1 2; do put "$1" "new$chunk" $((chunk * 1048576)); done
}
lost_pages_are_told() {
    fails_in_time 'Input/output error' sync "$1"
    works_in_time sync "$1"
    put "$1" again $((5 * 1048576))
    works_in_time sync "$1"
    same 'what was written afterwards' again "$(dd if="$DIR/mnt/2/d2/lost" bs=1 skip=$((5 * 1048576)) count=5 status=none)"
    rm "$1"
}
nothing_stays_dirty() {
    sync -f "$DIR/mnt/0" && sync -f "$DIR/mnt/1" && sync -f "$DIR/mnt/2"
    local slot
    for slot in 0 1 2; do
        within 20 bash -c "'$VERBFS' status --config '$DIR/verbfs.toml' --slot $slot --json | tee '$DIR/status' | grep -Eq '\"dirty\": *0([^0-9]|$)'" ||
            { cat "$DIR/status"; return 1; }
    done
}

start_cluster
check make_directories 20 make_directories
for home in 0 1 2; do
    echo known > "$DIR/mnt/0/d$home/known"
    sync "$DIR/mnt/0/d$home/known"
    touch "$DIR/mnt/0/d$home/locked" "$DIR/mnt/0/d$home/flocked"
done

for victim in ${VICTIMS:-1 2 0}; do
    echo "== node $victim dies"
    a=$(((victim + 1) % 3)) c=$(((victim + 2) % 3))

    # (a) what node a fsynced of pages that the victim wrote last
    for home in 0 1 2; do check "fsync_of_moved_page_$victim$home" 20 moved_page_prepare $a "$victim" $home; done
    # locks of programs on the victim's mount
    HOLDERS=()
    for home in 0 1 2; do
        rm -f "$DIR/ready$home"
        "$HELPER" hold "$DIR/mnt/$victim/d$home/locked" --ready "$DIR/ready$home" > /dev/null 2>&1 &
        HOLDERS+=($!)
        flock --no-fork "$DIR/mnt/$victim/d$home/flocked" sleep 300 &
        HOLDERS+=($!)
        check "lock_held_$victim$home" 10 within 5 test -e "$DIR/ready$home"
        check "lock_excludes_$victim$home" 10 refuses "$HELPER" take "$DIR/mnt/$a/d$home/locked" --limit 0
    done
    open_directories $a
    directories=("$D0" "$D1" "$D2")
    dead=${directories[$victim]}
    others=("${directories[@]:0:victim}" "${directories[@]:victim+1}")

    kill_node "$victim"
    # (c) at once, and again when the time-out has passed
    check "needs_dead_node_$victim" 120 while_dead_needs "$victim" "$dead"
    check "many_need_dead_node_$victim" 90 while_dead_many "$victim" "$dead"
    check "goes_on_without_$victim" 90 while_dead_goes_on "$victim" "${others[@]}"
    if [ "$victim" != 0 ]; then
        for home in 0 1 2; do
            [ $home = "$victim" ] || check "locks_of_dead_freed_$victim$home" 30 "$HELPER" take "$DIR/mnt/$c/d$home/locked" --limit 8
        done
    fi
    check "others_live_$victim" 5 alive
    for pid in "${HOLDERS[@]}"; do kill -KILL "$pid" 2> /dev/null || true; done
    for pid in "${HOLDERS[@]}"; do wait "$pid" 2> /dev/null || true; done
    close_directories
    restart_node "$victim"
    check "serves_again_$victim" 60 serves_again
    check "locks_freed_$victim" 60 locks_freed $c
    for home in 0 1 2; do
        for through in 0 1 2; do check "moved_page_is_there_$victim${home}_through_$through" 20 moved_page_verify $through $a $home "$victim"; done
    done

    # (b) all write everywhere; the victim dies among it, and comes back
    start_writers "$victim"
    sleep 3
    kill_node "$victim"
    sleep 5
    restart_node "$victim"
    sleep 2
    check "writers_end_$victim" 40 writers_end
    status=0
    for pid in "${WRITERS[@]}"; do
        kill -KILL "$pid" 2> /dev/null || true
        wait "$pid" 2> /dev/null || status=$?
    done
    if [ $status = 0 ]; then pass "calls_of_writers_in_time_$victim"; else
        fail "calls_of_writers_in_time_$victim" "a writer ended with status $status"
        cat "$DIR"/w"$victim"-*.out
    fi
    for through in 0 1 2; do check "acknowledged_is_there_${victim}_through_$through" 60 verify_writers "$victim" $through; done
    check "serves_after_writers_$victim" 60 serves_again
    check "all_live_$victim" 5 alive
done

echo "== pages die with the node that stores them"
for round in 1 2; do
    exec {LOST}<> "$DIR/mnt/0/d2/lost"
    check "lost_pages_prepare_$round" 20 lost_pages_prepare "$DIR/mnt/0/d2/lost"
    # Stopped, so that the background write-back of every few seconds gets as far as waiting for its commit.
    kill -STOP "${DAEMON[1]}"
    sleep 7
    kill_node 1
    restart_node 1
    check "lost_pages_are_told_$round" 60 lost_pages_are_told "$DIR/mnt/0/d2/lost"
    exec {LOST}>&-
done
check nothing_stays_dirty 60 nothing_stays_dirty
if stop_cluster; then pass cluster_stops_well; else fail cluster_stops_well 'see above'; fi
finish
