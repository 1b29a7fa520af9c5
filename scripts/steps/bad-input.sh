#!/usr/bin/env bash
# A peer that breaks the protocol, strangers on the sockets: refused and logged, no daemon dies of it, the file system serves on.
# The attacker takes the place of node 2 and holds the right key but where it says otherwise.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PEER_TIMEOUT=3s
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

SEED=${SEED:-1}
LIFE=1 # of node 2; a fenced life does not come back, so each attack is a later one

home_of() { echo $(($(stat -c %i "$1") >> 48)); }
make_directories() {
    local slot n
    for ((n = 0; n < 100; n++)); do
        mkdir "$DIR/mnt/0/try$n"
        slot=$(home_of "$DIR/mnt/0/try$n")
        if [ -e "$DIR/mnt/0/d$slot" ]; then rmdir "$DIR/mnt/0/try$n"; else mv "$DIR/mnt/0/try$n" "$DIR/mnt/0/d$slot"; fi
        if [ -d "$DIR/mnt/0/d0" ] && [ -d "$DIR/mnt/0/d1" ] && [ -d "$DIR/mnt/0/d2" ]; then break; fi
    done
    for slot in 0 1 2; do
        mkdir -p "$DIR/mnt/0/d$slot"
        head -c 3000000 /dev/urandom > "$DIR/mnt/0/d$slot/known"
        sync "$DIR/mnt/0/d$slot/known"
        cp "$DIR/mnt/1/d$slot/known" "$DIR/known$slot"
    done
}

# attack NAME ARGUMENTS...: one run of the attacker on nodes 0 and 1.
attack() {
    local name=$1
    shift
    "$BIN/verbfs-bad-peer" --attack "$name" --directory "$DIR/run/$CLUSTER" --key "$DIR/key" --cluster "$CLUSTER" --slot 2 --life "$LIFE" \
        --target 0 --target 1 "${INOS[@]}" --seed "$SEED" "$@"
}

# What programs do meanwhile with what the attacker is home of. Whether they succeed says nothing.
victims() {
    local mount
    for mount in 0 1; do
        (
            cd "$DIR/mnt/$mount" || exit 0
            while true; do
                for file in known "new$RANDOM"; do
                    timeout -s KILL 2 cat "d2/$file"
                    timeout -s KILL 2 ls -lR d2
                    timeout -s KILL 2 dd if=/dev/zero of="d2/$file" bs=5000 count=30 conv=notrunc,fsync
                    timeout -s KILL 2 mv "d2/$file" "d2/other"
                    timeout -s KILL 2 getfattr -d d2/known
                    timeout -s KILL 2 flock -n d2/known true
                    timeout -s KILL 2 truncate -s $((RANDOM * 40)) "d2/$file"
                    timeout -s KILL 2 mkdir "d2/dir$RANDOM"
                    timeout -s KILL 2 df .
                    timeout -s KILL 2 dd if=/dev/zero of="d0/mine" bs=4k count=600 conv=notrunc,fsync
                done
            done
        ) > /dev/null 2>&1 < /dev/null &
        VICTIMS+=($!)
    done
}

no_panic() { refuses grep -h 'panicked at' "$DIR"/node*.log; }

# The two that were attacked go on as if nothing had been, with new files and with old ones.
serves_on() {
    local home
    for home in 0 1; do
        within 15 bash -c "echo $RANDOM > '$DIR/mnt/0/d$home/small'"
        within 15 cmp "$DIR/mnt/0/d$home/small" "$DIR/mnt/1/d$home/small"
        rm "$DIR/mnt/1/d$home/small"
    done
    alive
    no_panic
}
serves_with_all() {
    local home
    for home in 0 1 2; do
        within 15 bash -c "head -c 2500000 /dev/urandom > '$DIR/mnt/0/d$home/big'"
        cmp "$DIR/mnt/0/d$home/big" "$DIR/mnt/2/d$home/big"
        cmp "$DIR/mnt/0/d$home/big" "$DIR/mnt/1/d$home/big"
        rm "$DIR/mnt/1/d$home/big"
    done
    "$BIN/verbfs-exerciser" --mount "$DIR/mnt/0" --mount "$DIR/mnt/1" --mount "$DIR/mnt/2" --seed 3 --operations 300 --max-size 1500000 --no-mmap
}
known_unchanged() {
    local home
    for home in 0 1 2; do cmp "$DIR/mnt/$1/d$home/known" "$DIR/known$home"; done
}
refusals_logged() { grep -h 'refused a peer' "$DIR"/node[01].log | sed 's/.*reason=//' | sort | uniq -c | sort -rn | sed -n 1,20p | grep .; }

# Each time a daemon dies or stands still, the next attack finds new ones. (A new one joins when all members have been
# there, so it does not serve before node 2 is back; its mount answers.)
revive() {
    local slot
    for slot in 0 1; do
        timeout 10 "$VERBFS" status --config "$DIR/verbfs.toml" --slot "$slot" > /dev/null 2>&1 || kill -KILL "${DAEMON[$slot]}" 2> /dev/null || true
        sleep 0.1
        if ! kill -0 "${DAEMON[$slot]}" 2> /dev/null; then
            echo "node $slot has ended:"
            grep -A 3 'panicked at' "$DIR/node$slot.log" | tail -4 || true
            cat "$DIR/node$slot.log" >> "$DIR/dead.log"
            : > "$DIR/node$slot.log"
            wait "${DAEMON[$slot]}" 2> /dev/null || true
            umount -l "$DIR/mnt/$slot" 2> /dev/null || true
            start_node "$slot"
            within 30 mountpoint -q "$DIR/mnt/$slot"
        fi
    done
}

start_cluster
check make_directories 30 make_directories
INOS=()
for home in 0 1 2; do INOS+=(--ino "$(stat -c %i "$DIR/mnt/0/d$home")" --ino "$(stat -c %i "$DIR/mnt/0/d$home/known")"); done

# Strangers, while all three serve.
check strangers_on_the_sockets 60 attack stranger --messages 1500
check serves_on_after_strangers 60 serves_on
check serves_with_all_after_strangers 60 serves_with_all
check known_unchanged_after_strangers 30 known_unchanged 1

kill -TERM "${DAEMON[2]}"
wait "${DAEMON[2]}" || fail node_2_leaves "status $?"
unset "DAEMON[2]"

check wrong_key_is_refused 60 attack wrong-key
check wrong_cluster_is_refused 60 attack wrong-cluster
check serves_on_after_refusals 60 serves_on

VICTIMS=()
read -ra ATTACKS <<< "${ATTACKS:-bytes typed scribble answer}"
for round in 1 2 3; do
    for name in "${ATTACKS[@]}"; do
        LIFE=$((LIFE + 1)) SEED=$((SEED + 1))
        case $name in
            bytes | typed) arguments=(--messages 1500) ;;
            answer) arguments=(--seconds 8); victims ;;
            *) arguments=() ;;
        esac
        check "attack_${name}_$round" 60 attack "$name" "${arguments[@]}"
        for pid in "${VICTIMS[@]}"; do kill -KILL "$pid" 2> /dev/null || true; done
        for pid in "${VICTIMS[@]}"; do wait "$pid" 2> /dev/null || true; done
        VICTIMS=()
        check "serves_on_after_${name}_$round" 40 serves_on
        revive
    done
done
check refusals_are_logged 5 refusals_logged

# The real node 2 comes back. It counts its lives in its store: it must have lived more often than the attacker claimed.
begins() { [ -S "$DIR/run/$CLUSTER/2.sock" ]; }
while [ $((LIFE -= 1)) -gt 0 ]; do
    rm -f "$DIR/run/$CLUSTER/2.sock"
    "$VERBFS" start --foreground --config "$DIR/verbfs.toml" --slot 2 >> "$DIR/node2.log" 2>&1 < /dev/null &
    DAEMON[2]=$!
    check "node_2_begins_$LIFE" 10 within 10 begins
    kill -KILL "${DAEMON[2]}"
    wait "${DAEMON[2]}" 2> /dev/null || true
done
start_node 2
wait_for_node 2
check serves_with_all 90 serves_with_all
if stop_cluster; then pass cluster_stops_well; else fail cluster_stops_well 'see above'; fi
finish
