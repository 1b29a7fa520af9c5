#!/usr/bin/env bash
# One of three hosts, each a virtual machine with a software RDMA device and one daemon: clients of all three make the history of
# the coherence suite together, the host joins and judges it. Then both exercisers on each host, and fio writes on one and
# verifies on the others. For the guests of scripts/steps/verbs-coherence.sh, which says how much.
set -euo pipefail
cd "$(dirname "$0")/../../.."
# What checks.sh wants.
DIR=/tmp/hosts
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh
# shellcheck source=scripts/steps/lib/guest-node.sh
. scripts/steps/lib/guest-node.sh

ARENA=128MiB CACHE=32MiB
start_guest_node hosts 3
vm-barrier serving

# The program of each guest is a part; they wait for each other in the meeting's directory.
part() {
    mkdir -p "$VM_SHARED/meeting-$1"
    "$BIN/verbfs-coherence" --mount "$MOUNT" --part "$SLOT" --parts 3 --meeting "$VM_SHARED/meeting-$1" --seed "$1" \
        --operations "$JOINED_OPERATIONS" --families data,names,locks
}
FIO=(--name=hosts --filename=fio --ioengine=psync --rw=randwrite --bsrange=512-64k --bs_unaligned=1 --size=2M
    --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=4711 --output="$DIR/fio.out")
fio_writes() { cd "$MOUNT" && fio "${FIO[@]}" --do_verify=0; }
fio_verifies() { cd "$MOUNT" && fio "${FIO[@]}" --verify_only; }
still_serves() { guest_node_serves; }

for seed in $SEEDS; do
    check "three_guests_part_$seed" "$CHECK_LIMIT" part "$seed"
    # Each on its own mount, all at once. The reference, a tmpfs of Linux 6.1, has no attributes of users.
    check "three_guests_exerciser_$seed" "$CHECK_LIMIT" "$BIN/verbfs-exerciser" --mount "$MOUNT" --seed "$((seed + VM_GUEST))" --operations "$EXERCISES" --no-mmap
    mkdir -p "$PLACE/reference"
    check "three_guests_names_exerciser_$seed" "$CHECK_LIMIT" "$BIN/verbfs-namespace-exerciser" --mount "$MOUNT" --reference "$PLACE/reference" --no-xattr --seed "$((seed + VM_GUEST))" --operations "$EXERCISES"
done
[ "$VM_GUEST" != 2 ] || check three_guests_fio_writes "$CHECK_LIMIT" fio_writes
vm-barrier written "$CHECK_LIMIT"
check three_guests_fio_verifies "$CHECK_LIMIT" fio_verifies
check three_guests_node_serves 10 still_serves
vm-barrier ended "$CHECK_LIMIT"
if stop_guest_node; then pass three_guests_node_stops_well; else fail three_guests_node_stops_well 'see above'; fi
finish
