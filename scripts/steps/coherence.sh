#!/usr/bin/env bash
# Clients on all mounts at once record what they did and saw; a checker must find an order of instants that explains it.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

# The checker must be able to say no: one read made stale in the record, and it has to notice.
stale_read_is_rejected() {
    local status=0
    "$BIN/verbfs-coherence" "${MOUNTS[@]}" --seed "$1" --operations 2000 --families data --inject-stale-read || status=$?
    same 'exit status' 1 $status
}

start_cluster
for seed in ${SEEDS:-1 2 3 4}; do
    for family in data names mmap locks; do
        check "${family}_$seed" 90 "$BIN/verbfs-coherence" "${MOUNTS[@]}" --seed "$seed" --operations 6000 --families $family
    done
done
check stale_read_is_rejected 60 stale_read_is_rejected 7
check daemons_live 5 alive
if stop_cluster; then pass cluster_stops_well; else fail cluster_stops_well 'see above'; fi
# The same with pages going by way of the node that stores them instead of straight to the next holder.
LOCKS='hand_over = false'
start_cluster
for family in data mmap; do
    check "${family}_without_hand_over" 90 "$BIN/verbfs-coherence" "${MOUNTS[@]}" --seed 11 --operations 6000 --families $family
done
if stop_cluster; then pass cluster_stops_again; else fail cluster_stops_again 'see above'; fi
finish
