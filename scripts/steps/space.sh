#!/usr/bin/env bash
# A small cluster filled to the brim: ENOSPC comes from write(2) and never later, what is removed is there to be used again,
# and df, st_blocks and the count of inodes say so.
set -euo pipefail
cd "$(dirname "$0")/../.."
export ARENA=64MiB CACHE=16MiB
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

home_of() { echo $(($(stat -c %i "$1") >> 48)); }
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

available() { df --output=avail -B1K "$DIR/mnt/$1" | tail -1 | xargs; }
inodes_used() { df --output=iused "$DIR/mnt/$1" | tail -1 | xargs; }
# Space and inodes as they were, on every mount, give or take KiB.
space_is_back() {
    local mount now
    for mount in 0 1 2; do
        now=$(available $mount)
        [ $((now + ${2:-0})) -ge "$1" ] || { echo "mount $mount: $now KiB available, before it were $1"; return 1; }
    done
}
inodes_are() {
    local mount
    for mount in 0 1 2; do same "inodes on mount $mount" "$1" "$(inodes_used $mount)"; done
}
counters_agree() { # FILE: the size du has of it through each mount
    local mount first
    first=$(stat -c %b "$DIR/mnt/0/$1")
    for mount in 1 2; do same "st_blocks through $mount" "$first" "$(stat -c %b "$DIR/mnt/$mount/$1")"; done
}

# One file, until it is full. dd says which call failed: it writes first, fsyncs later, and both are to be told apart.
fill_one_file() { # mount, home, block size
    local file=$DIR/mnt/$1/d$2/full before output status=0 size
    before=$(available "$1")
    output=$(LC_ALL=C dd if=/dev/zero of="$file" bs="$3" 2>&1) || status=$?
    same 'status of dd' 1 $status
    [[ $output == *"error writing"*"No space left on device"* ]] || { echo "$output"; return 1; }
    # What write(2) took is safe.
    sync "$file"
    size=$(stat -c %s "$file")
    same 'bytes read back' "$size" "$(wc -c < "$DIR/mnt/$((($1 + 1) % 3))/d$2/full")"
    cmp -n "$size" "$file" /dev/zero
    echo "size $size, before $before KiB were available, now $(available "$1")"
    # A file is spread over three arenas of 64 MiB, in turn: it must get at least most of them.
    [ "$size" -gt $((150 * 1048576)) ]
    [ "$(stat -c %b "$file")" -ge $((size / 512)) ] && [ "$(stat -c %b "$file")" -le $((size / 512 + 4096)) ]
    counters_agree "d$2/full"
    # Full is full for all, and what exists can be overwritten in place.
    local mount
    for mount in 0 1 2; do
        dd if=/dev/urandom of="$DIR/mnt/$mount/d$2/full" bs=4k seek=$((mount * 1000)) count=100 conv=notrunc,fsync status=none
    done
    rm "$DIR/mnt/$((($1 + 2) % 3))/d$2/full"
    within 10 space_is_back "$before" 64
}

# All three mounts at once, many files, small writes, each closed: no error may wait for fsync or close.
fill_by_all() {
    local mount before pids=() status
    before=$(available 0)
    filler() {
        local n output
        for ((n = 0; n < 2000; n++)); do
            if ! output=$(LC_ALL=C dd if=/dev/zero of="$DIR/mnt/$1/d$((n % 3))/fill-$1-$n" bs=20000 count=$((n % 40 + 1)) conv=fsync 2>&1); then
                echo "$1: $output"
                [[ $output == *"No space left on device"* ]] || return 1
                # From write, or from open: a new name needs space too.
                [[ $output == *"error writing"* || $output == *"failed to open"* ]] || return 1
                return 0
            fi
        done
        echo "$1: never full"
        return 1
    }
    for mount in 0 1 2; do filler $mount & pids+=($!); done
    for mount in 0 1 2; do
        status=0
        wait "${pids[$mount]}" || status=$?
        same "filler $mount" 0 $status
    done
    # Everything written is there.
    local file bad=0
    for file in "$DIR"/mnt/1/d?/fill-*; do
        cmp -s -n "$(stat -c %s "$file")" "$file" /dev/zero || { echo "differs: $file"; bad=1; }
    done
    # On a full file system names can be removed, renamed, and files cut.
    mv "$DIR/mnt/0/d0/fill-0-0" "$DIR/mnt/0/d1/renamed"
    truncate -s 100 "$DIR/mnt/1/d1/renamed"
    mkdir "$DIR/mnt/2/dir" && rmdir "$DIR/mnt/0/dir"
    rm -r "$DIR"/mnt/2/d?/fill-* "$DIR/mnt/2/d1/renamed"
    within 10 space_is_back "$before" 64
    return $bad
}

# A file that is removed while open keeps its space until it is closed, wherever that is.
removed_while_open() {
    local before
    before=$(available 1)
    head -c 20000000 /dev/urandom > "$DIR/mnt/0/d1/open"
    sync "$DIR/mnt/0/d1/open"
    exec 7< "$DIR/mnt/1/d1/open"
    rm "$DIR/mnt/2/d1/open"
    sleep 0.5
    [ "$(available 1)" -le $((before - 19000)) ] || { echo "its space went while it was open"; return 1; }
    same 'bytes' 20000000 "$(wc -c <&7)"
    exec 7<&-
    within 10 space_is_back "$before" 64
}

holes_and_cuts() {
    local file=d2/holes before
    before=$(available 0)
    head -c 12582912 /dev/urandom > "$DIR/mnt/0/$file"
    sync "$DIR/mnt/0/$file"
    same 'st_blocks' $((12582912 / 512)) "$(stat -c %b "$DIR/mnt/1/$file")"
    fallocate -p -o 1048576 -l 4194304 "$DIR/mnt/1/$file"
    same 'st_blocks with a hole' $((8388608 / 512)) "$(stat -c %b "$DIR/mnt/2/$file")"
    within 10 space_is_back $((before - 8192)) 64
    truncate -s 6291456 "$DIR/mnt/2/$file"
    same 'st_blocks when cut' $((2097152 / 512)) "$(stat -c %b "$DIR/mnt/0/$file")"
    within 10 space_is_back $((before - 2048)) 64
    truncate -s 1T "$DIR/mnt/0/$file"
    same 'st_blocks when prolonged' $((2097152 / 512)) "$(stat -c %b "$DIR/mnt/1/$file")"
    counters_agree $file
    # Allocated ahead, beyond the end, with nothing in it.
    truncate -s 0 "$DIR/mnt/1/$file"
    same 'st_blocks when empty' 0 "$(stat -c %b "$DIR/mnt/2/$file")"
    fallocate -n -l 8388608 "$DIR/mnt/2/$file"
    same 'size' 0 "$(stat -c %s "$DIR/mnt/0/$file")"
    same 'st_blocks allocated ahead' $((8388608 / 512)) "$(stat -c %b "$DIR/mnt/0/$file")"
    local space blocks
    space=$(available 0) blocks=$(stat -c %b "$DIR/mnt/0/$file")
    refuses fallocate -l 1G "$DIR/mnt/0/$file" 2> /dev/null
    same 'blocks after fallocate failed' "$blocks" "$(stat -c %b "$DIR/mnt/1/$file")"
    same 'space after fallocate failed' "$space" "$(available 0)"
    rm "$DIR/mnt/0/$file"
    within 10 space_is_back "$before" 64
}

# What a growing file has allocated ahead is not counted as its own, and goes back when it is closed.
allocated_ahead() {
    local file=d1/grows before n mount pages
    before=$(available 0)
    exec 7>> "$DIR/mnt/0/$file" 8>> "$DIR/mnt/1/$file"
    for n in {1..60}; do
        head -c 5000 /dev/zero >&7
        head -c 5000 /dev/zero >&8
        for mount in 0 1 2; do
            pages=$(((n * 10000 + 4095) / 4096))
            same "st_blocks through $mount after $n" $((pages * 8)) "$(stat -c %b "$DIR/mnt/$mount/$file")"
        done
    done
    truncate -s 300000 "$DIR/mnt/2/$file"
    same 'st_blocks when cut' $((74 * 8)) "$(stat -c %b "$DIR/mnt/2/$file")"
    head -c 5000 /dev/zero >&7
    same 'st_blocks when it grows again' $((75 * 8)) "$(stat -c %b "$DIR/mnt/1/$file")"
    exec 7>&- 8>&-
    within 5 space_is_back $((before - 75 * 4)) 0
    rm "$DIR/mnt/2/$file"
    within 5 space_is_back "$before" 0
}
# And it goes back when somebody else needs the space: many open files keep nobody from filling the rest.
spare_is_returned() {
    fill() { LC_ALL=C dd if=/dev/zero of="$DIR/mnt/0/d0/fill" bs=64k 2> /dev/null || stat -c %s "$DIR/mnt/0/d0/fill"; }
    local alone beside n descriptors=()
    alone=$(fill)
    rm "$DIR/mnt/0/d0/fill"
    for n in {1..60}; do
        exec {descriptor}>> "$DIR/mnt/$((n % 3))/d0/holder$n"
        descriptors+=("$descriptor")
        head -c 200000 /dev/zero >&"$descriptor"
        head -c 4096 /dev/zero >&"$descriptor"
    done
    beside=$(fill)
    echo "alone $alone, beside the others $beside"
    # The file is spread over three arenas, and ends where the first is full: that of the others.
    [ "$beside" -ge $((alone - 60 * 208000 * 3 - 3 * 1048576)) ]
    for descriptor in "${descriptors[@]}"; do exec {descriptor}>&-; done
    rm "$DIR"/mnt/0/d0/fill "$DIR"/mnt/0/d0/holder*
}

# Written and removed again and again, many times what fits: whatever leaks would fill it.
create_and_delete() {
    local before inodes round mount
    before=$(available 0)
    inodes=$(inodes_used 0)
    for ((round = 0; round < 40; round++)); do
        mount=$((round % 3))
        for n in {1..12}; do
            head -c $((n * 131071)) /dev/zero > "$DIR/mnt/$mount/d$((n % 3))/cycle-$n"
        done
        mkdir -p "$DIR/mnt/$mount/d0/tree/a/b"
        ln -s x "$DIR/mnt/$mount/d0/tree/link"
        ln "$DIR/mnt/$mount/d0/cycle-3" "$DIR/mnt/$mount/d0/tree/hard"
        rm -r "$DIR/mnt/$(((mount + 1) % 3))"/d?/cycle-* "$DIR/mnt/$(((mount + 1) % 3))/d0/tree"
    done
    within 10 space_is_back "$before" 64
    within 10 inodes_are "$inodes"
}
# The same, removed before it was ever written back, and by truncation and replacement.
overwrite_and_replace() {
    local before inodes round
    before=$(available 0)
    inodes=$(inodes_used 0)
    for ((round = 0; round < 60; round++)); do
        head -c 3000000 /dev/zero > "$DIR/mnt/$((round % 3))/d1/again"
        head -c 2000000 /dev/zero > "$DIR/mnt/$(((round + 1) % 3))/d2/new"
        mv "$DIR/mnt/$(((round + 2) % 3))/d2/new" "$DIR/mnt/$(((round + 2) % 3))/d1/replaced"
    done
    rm "$DIR/mnt/0/d1/again" "$DIR/mnt/1/d1/replaced"
    within 10 space_is_back "$before" 64
    within 10 inodes_are "$inodes"
}
inodes_count() {
    local before n
    before=$(inodes_used 1)
    for n in {1..50}; do : > "$DIR/mnt/$((n % 3))/d$((n % 2))/inode$n"; done
    inodes_are $((before + 50))
    rm "$DIR"/mnt/0/d?/inode*
    within 10 inodes_are "$before"
}
# What restarts find is what was there.
survives_restart() {
    same 'available' "$AVAILABLE_BEFORE" "$(available 1)"
    same 'inodes' "$INODES_BEFORE" "$(inodes_used 1)"
    rm "$DIR/mnt/1/d0/kept"
}

start_cluster
check make_directories 20 make_directories
check inodes_count 30 inodes_count
check holes_and_cuts 60 holes_and_cuts
check allocated_ahead 60 allocated_ahead
check spare_is_returned 120 spare_is_returned
check removed_while_open 30 removed_while_open
check create_and_delete 120 create_and_delete
check overwrite_and_replace 120 overwrite_and_replace
check fill_one_file_1m 90 fill_one_file 0 0 1M
check fill_one_file_odd 90 fill_one_file 1 2 47008
check fill_one_file_remote 90 fill_one_file 2 1 4k
check fill_by_all 180 fill_by_all
check fill_by_all_again 180 fill_by_all
head -c 5000000 /dev/zero > "$DIR/mnt/0/d0/kept"
sync "$DIR/mnt/0/d0/kept"
AVAILABLE_BEFORE=$(available 0) INODES_BEFORE=$(inodes_used 0)
if stop_cluster; then pass cluster_stops_well; else fail cluster_stops_well 'see above'; fi
start_cluster
check survives_restart 20 survives_restart
if stop_cluster; then pass cluster_stops_again; else fail cluster_stops_again 'see above'; fi
finish
