#!/usr/bin/env bash
# One of two hosts, each a virtual machine with a software RDMA device and one daemon, which choose `verbs` by themselves.
# What one host writes the other reads. For the guests of scripts/steps/verbs.sh; VERBFS is the program.
set -euo pipefail
cd "$(dirname "$0")/../../.."
# shellcheck source=scripts/steps/lib/guest-node.sh
. scripts/steps/lib/guest-node.sh

start_guest_node hosts 2
vm-barrier serving
seq 1 30000 > "$PLACE/expected"
[ "$VM_GUEST" != 2 ] || cp "$PLACE/expected" "$MOUNT/file"
vm-barrier written
cmp "$PLACE/expected" "$MOUNT/file"
echo "line of host $VM_GUEST" >> "$MOUNT/lines"
vm-barrier appended
[ "$(sort "$MOUNT/lines")" = $'line of host 1\nline of host 2' ]
vm-barrier compared
stop_guest_node
echo "host $VM_GUEST: same bytes, ended well"
