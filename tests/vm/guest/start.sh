#!/usr/bin/env bash
# First program of a guest: makes it a node with SoftRoCE, then runs the command. Called by virtme-ng's init; $1 is the
# guest's directory of results, where `environment` says what to run.
set -euo pipefail

say() { echo "<6>verbfs-vm: $*" > /dev/kmsg; }
trap 'say "the guest could not be set up: line $LINENO"; exit 125' ERR

results=$1
# shellcheck disable=SC1091 # written by run.sh
. "$results/environment"

modprobe -a virtio_net rdma_rxe rdma_ucm ib_uverbs fuse

netdev=
for try in {1..100}; do
    for path in /sys/bus/virtio/drivers/virtio_net/virtio*/net/*; do
        [ ! -e "$path" ] || netdev=${path##*/}
    done
    [ -z "$netdev" ] || break
    sleep 0.1
done
[ -n "$netdev" ] || { say "no network interface after $try tries"; false; }
{
    # udev names interfaces by their slot; tests want one name.
    [ "$netdev" = eth0 ] || echo "link set dev $netdev name eth0"
    # Room for RDMA's largest packets, 4096 bytes and headers.
    echo "link set dev eth0 mtu 4500 up"
    echo "addr add $VM_ADDRESS/24 dev eth0"
} | ip -batch -
rdma link add rxe0 type rxe netdev eth0

# The shared memory of the time base: the region of the one device that is 1af4:1110.
for path in /sys/bus/pci/devices/*; do
    if read -r device < "$path/device" && [ "$device" = 0x1110 ]; then export VERBFS_CLOCK=$path/resource2; fi
done

# The command's root: the host's again, but cached, since a program that starts is read anew from the other one each time.
root=/run/vm/root
mkdir -p $root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,access=any,msize=524288,cache=loose verbfs.root $root
for path in dev proc sys run usr/lib/modules; do mount --rbind "/$path" "$root/$path"; done
for path in tmp var/tmp var/log; do
    [ ! -d "$root/$path" ] || mount -t tmpfs -o mode=1777 tmpfs "$root/$path"
done
# Results are written without a cache: the host and the other guests look at them. They and the sources may lie below /tmp.
for path in "$VM_SOURCE" "$results" "$VM_SHARED"; do
    case $path in /tmp/* | "$results" | "$VM_SHARED") mkdir -p "$root$path" && mount --bind "$path" "$root$path" ;; esac
done
{
    echo "127.0.0.1 localhost"
    for ((n = 1; n <= VM_GUESTS; n++)); do echo "198.18.0.$n guest$n"; done
} > /run/vm/hosts
mount --bind /run/vm/hosts $root/etc/hosts

ulimit -l unlimited
ulimit -n 65536
export HOME=/root TMPDIR=/tmp PATH=$VM_SOURCE/tests/vm/guest/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
trap - ERR
set +e
say "ready after $(cut -d. -f1 /proc/uptime) s"
touch "$results/ready"
# shellcheck disable=SC2016 # the inner shell expands its own arguments
run=(chroot "$root" bash -c 'cd "$0" 2> /dev/null || cd "$1"; shift; exec "$@"' "$VM_DIRECTORY" "$VM_SOURCE" "${VM_COMMAND[@]}")
# At a prompt: no host waits for a status.
[ ! -t 0 ] || exec "${run[@]}"
until [ -e "$VM_SHARED/go" ]; do sleep 0.2; done
"${run[@]}" 2>&1
status=$?
say "the command ended with $status"
dmesg > "$results/dmesg.log" 2>&1
echo $status > "$results/status.new" && mv "$results/status.new" "$results/status"
exit $status
