#!/usr/bin/env bash
# Second program of a guest, in the host's root: makes the guest a node with SoftRoCE, then runs the command. $1 is the guest's
# directory of results, where `environment` says what to run.
set -euo pipefail

say() { echo "<6>verbfs-vm: $*" > /dev/kmsg; }
trap 'say "the guest could not be set up: line $LINENO"; exit 125' ERR

results=$1
# shellcheck disable=SC1091 # written by run.sh
. "$results/environment"
export HOME=/root TMPDIR=/tmp PATH=$VM_SOURCE/tests/vm/guest/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# Where modprobe finds this kernel's modules.
export MODPROBE_OPTIONS="-d /run/vm/kernel"

{
    echo "link set dev lo up"
    # Room for RDMA's largest packets, 4096 bytes and headers.
    echo "link set dev eth0 mtu 4500 up"
    echo "addr add $VM_ADDRESS/24 dev eth0"
} | ip -batch -
rdma link add rxe0 type rxe netdev eth0

# The shared memory of the time base: the region of the one device that is 1af4:1110.
for path in /sys/bus/pci/devices/*; do
    if read -r device < "$path/device" && [ "$device" = 0x1110 ]; then export VERBFS_CLOCK=$path/resource2; fi
done
{
    echo "127.0.0.1 localhost"
    for ((n = 1; n <= VM_GUESTS; n++)); do echo "198.18.0.$n guest$n"; done
} > /run/vm/hosts
mount --bind /run/vm/hosts /etc/hosts

ulimit -l unlimited
ulimit -n 65536
trap - ERR
set +e
cd "$VM_DIRECTORY" 2> /dev/null || cd "$VM_SOURCE" || exit
say "ready after $(cut -d. -f1 /proc/uptime) s"
touch "$results/ready"
until [ -e "$VM_SHARED/go" ]; do sleep 0.2; done

if [ -n "$VM_SHELL" ]; then
    stty -F /dev/hvc0 sane rows "$VM_ROWS" cols "$VM_COLUMNS"
    setsid -c "${VM_COMMAND[@]}" < /dev/hvc0 > /dev/hvc0 2>&1
    status=0
else
    # The port takes one writer; through a pipe, programs can open /dev/stdout again.
    exec 8> >(exec cat > "$VM_OUTPUT")
    writer=$!
    "${VM_COMMAND[@]}" < /dev/null >&8 2>&1
    status=$?
    exec 8>&-
    # What the command left running may hold the pipe.
    for _ in {1..10}; do
        kill -0 $writer 2> /dev/null || break
        sleep 0.1
    done
fi
say "the command ended with $status"
dmesg > "$results/dmesg.log" 2>&1
echo $status > "$results/status.new" && mv "$results/status.new" "$results/status"
