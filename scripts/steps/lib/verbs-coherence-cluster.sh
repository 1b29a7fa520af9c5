#!/usr/bin/env bash
# Three daemons on one host, joined by its RDMA device, whose address is ADDRESS: the coherence suite, both exercisers and fio's
# verification, without shared mappings. For the guest of scripts/steps/verbs-coherence.sh, which says how much.
set -euo pipefail
cd "$(dirname "$0")/../../.."
FABRIC=verbs ARENA=128MiB CACHE=32MiB PEER_TIMEOUT=30s
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

on_verbs() {
    local slot
    for ((slot = 0; slot < NODES; slot++)); do
        "$VERBFS" status --config "$DIR/verbfs.toml" --slot "$slot" --json | grep '"fabric": *"verbs ('
    done
}
fio_verifies() {
    local options=(--name=three --filename=fio --ioengine=psync --rw=randwrite --bsrange=512-64k --bs_unaligned=1 --size=4M
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=4711 --output="$DIR/fio.out")
    (cd "$DIR/mnt/0" && fio "${options[@]}" --do_verify=0)
    (cd "$DIR/mnt/1" && fio "${options[@]}" --verify_only)
    (cd "$DIR/mnt/2" && fio "${options[@]}" --verify_only)
    # What is spoilt must be found, or the above says nothing.
    head -c 400000 /dev/zero > "$DIR/mnt/2/fio"
    cd "$DIR/mnt/1"
    refuses fio "${options[@]}" --verify_only
}

start_cluster
mkdir "$DIR/reference"
check on_verbs 10 on_verbs
for seed in $SEEDS; do
    for family in data names locks; do
        check "one_guest_${family}_$seed" "$CHECK_LIMIT" "$BIN/verbfs-coherence" "${MOUNTS[@]}" --seed "$seed" --operations "$OPERATIONS" --families $family
    done
    check "one_guest_exerciser_$seed" "$CHECK_LIMIT" "$BIN/verbfs-exerciser" "${MOUNTS[@]}" --seed "$seed" --operations "$EXERCISES" --no-mmap
    # The reference, a tmpfs of Linux 6.1, has no attributes of users.
    check "one_guest_names_exerciser_$seed" "$CHECK_LIMIT" "$BIN/verbfs-namespace-exerciser" "${MOUNTS[@]}" --reference "$DIR/reference" --no-xattr --seed "$seed" --operations "$EXERCISES"
done
check one_guest_fio "$CHECK_LIMIT" fio_verifies
check one_guest_daemons_live 5 alive
if stop_cluster; then pass one_guest_cluster_stops_well; else fail one_guest_cluster_stops_well 'see above'; fi
finish
