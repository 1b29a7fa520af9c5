#!/usr/bin/env bash
# One of two hosts, each a virtual machine, that send each other numbered messages (`host_of_two` in rdma/src/verbs/faults.rs, the
# program $1) while the link of the second goes down for two seconds and for six, its wire is cut, and it is stopped altogether:
# all messages come, in order and once. Not yet a part of a step: it finds a fault that is not mended (docs/status.md).
#
#   tests/vm/run.sh --guests 2 --memory 1G --limit 900 -- scripts/steps/lib/verbs-faults.sh PROGRAM [FAULT...]
set -euo pipefail
export VERBFS_RDMA_ADDRESS=$VM_ADDRESS VERBFS_FAULT_SLOT=$VM_GUEST VERBFS_FAULT_PEER=198.18.0.$((3 - VM_GUEST)) TMPDIR=/dev/shm

# The faults, made by the second guest but for the last. Six seconds are more than the device's retries.
link_down_2_s() { vm-link down; sleep 2; vm-link up; }
link_down_6_s() { vm-link down; sleep 6; vm-link up; }
wire_cut_6_s() { vm-control unplug 2; sleep 6; vm-control plug 2; }
stopped_6_s() { vm-control stop 2; sleep 6; vm-control cont 2; }

failed=0
# fault NAME GUEST ENDS [STOPPED]: GUEST makes it while both send; so many connections must have ended at the least.
fault() {
    local name=$1 guest=$2 ends=$3 program status=0
    [ -z "${4:-}" ] || [ "$4" != "$VM_GUEST" ] || export VERBFS_FAULT_STOPPED=yes
    export VERBFS_FAULT_DIRECTORY=$VM_SHARED/$name VERBFS_FAULT_ENDS=$ends
    mkdir -p "$VERBFS_FAULT_DIRECTORY"
    "$program_of_hosts" --exact verbs::faults::host_of_two --ignored --nocapture > "$VM_RESULTS/$name.log" 2>&1 &
    program=$!
    for other in 1 2; do
        until [ -e "$VERBFS_FAULT_DIRECTORY/up.$other" ] || ! kill -0 $program 2> /dev/null; do sleep 0.1; done
    done
    sleep 1
    if [ "$VM_GUEST" = "$guest" ]; then
        "$name"
        sleep 1
        touch "$VERBFS_FAULT_DIRECTORY/enough"
    fi
    wait $program || status=$?
    grep -o 'slot [12]: .*' "$VM_RESULTS/$name.log" || true
    if [ $status = 0 ]; then
        echo "ok      $name"
    else
        echo "FAILED  $name"
        tail -20 "$VM_RESULTS/$name.log"
        failed=$((failed + 1))
    fi
    unset VERBFS_FAULT_STOPPED
    vm-barrier "after-$name" 300
}
program_of_hosts=$1
wanted=${*:2}
wanted=" ${wanted:-link_down_2_s link_down_6_s wire_cut_6_s stopped_6_s} "
[[ $wanted != *' link_down_2_s '* ]] || fault link_down_2_s 2 0
[[ $wanted != *' link_down_6_s '* ]] || fault link_down_6_s 2 1
[[ $wanted != *' wire_cut_6_s '* ]] || fault wire_cut_6_s 2 1
[[ $wanted != *' stopped_6_s '* ]] || fault stopped_6_s 1 1 2
[ $failed = 0 ]
