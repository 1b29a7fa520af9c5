#!/usr/bin/env bash
# First program of a guest: makes it a node with SoftRoCE, then runs the command. Called by virtme-ng's init; $1 is the
# directory of results, which alone is writable and shared with the host. `environment` in it says what to run.
set -euo pipefail

say() { echo "<6>verbfs-vm: $*" > /dev/kmsg; }
# The command never ran: run.sh tells this from a command that failed by the file `status`, which is not there then.
trap 'say "the guest could not be set up: line $LINENO"; exit 125' ERR

results=$1
# shellcheck disable=SC1091 # written by run.sh
. "$results/environment"

say "loading modules"
modprobe -a virtio_net rdma_rxe rdma_ucm ib_uverbs fuse overlay

say "network"
netdev=
for try in {1..100}; do
    for path in /sys/bus/virtio/drivers/virtio_net/virtio*/net/*; do
        [ ! -e "$path" ] || netdev=$(basename "$path")
    done
    [ -z "$netdev" ] || break
    sleep 0.1
done
[ -n "$netdev" ] || { say "no network interface after $try tries"; false; }
{
    # udev names interfaces by their slot; tests want one name.
    [ "$netdev" = eth0 ] || echo "link set dev $netdev name eth0"
    # Room for RDMA's largest packets, 4096 bytes and headers. Neighbours are known from the start.
    echo "link set dev eth0 mtu 4500 up"
    echo "addr add $VM_ADDRESS/24 dev eth0"
} | ip -batch -
rdma link add rxe0 type rxe netdev eth0

# The root is the host's, and read-only. /tmp is this guest's own; results and source tree may lie below it.
mkdir -p /run/vm/results /run/vm/source
mount --bind "$results" /run/vm/results
mount --bind "$VM_SOURCE" /run/vm/source
mount -t tmpfs -o mode=1777 tmpfs /tmp
case $results in /tmp/*) mkdir -p "$results" && mount --bind /run/vm/results "$results" ;; esac
case $VM_SOURCE in /tmp/*) mkdir -p "$VM_SOURCE" && mount --bind /run/vm/source "$VM_SOURCE" ;; esac

ulimit -l unlimited
ulimit -n 65536
export HOME=/root TMPDIR=/tmp
cd "$VM_DIRECTORY" || cd "$VM_SOURCE"
trap - ERR
set +e
say "ready after $(cut -d. -f1 /proc/uptime) s"
touch "$results/ready"
"${VM_COMMAND[@]}" 2>&1
status=$?
say "the command ended with $status"
dmesg > "$results/dmesg.log" 2>&1
echo $status > "$results/status.new" && mv "$results/status.new" "$results/status"
sync
exit $status
