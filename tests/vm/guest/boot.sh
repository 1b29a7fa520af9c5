#!/bin/sh
# shellcheck disable=SC3040 # busybox knows pipefail
# First program of a guest, run by virtme-ng's init in a root that holds a busybox and the kernel's modules: puts the host's
# root in place and goes on there, with start.sh. `places`, beside it, says where things are.
set -euo pipefail

say() { echo "<6>verbfs-vm: $*" > /dev/kmsg; }
trap '[ $? = 0 ] || say "the guest could not be booted"' EXIT

# shellcheck disable=SC1091 # written by run.sh
. /vm/results/places
source=$VM_SOURCE results=$VM_RESULTS shared=$VM_SHARED

modprobe -a virtio_net rdma_rxe rdma_ucm ib_uverbs fuse

# The host's root with a cache: without one, as virtme-ng mounts, a program that starts is read anew each time.
root=/run/vm/root
mkdir -p $root /run/vm/kernel/lib
mount -t 9p -o ro,trans=virtio,version=9p2000.L,access=any,msize=524288,cache=loose verbfs.host $root
mount --bind /lib /run/vm/kernel/lib
for path in dev proc sys run; do mount --rbind /$path $root/$path; done
# The sources may lie below /tmp, which becomes the guest's own.
mkdir -p /run/vm/source
mount --bind "$root$source" /run/vm/source
for path in tmp var/tmp var/log; do
    [ ! -d $root/$path ] || mount -t tmpfs -o mode=1777 tmpfs $root/$path
done
case $source in /tmp/*) mkdir -p "$root$source"; mount --bind /run/vm/source "$root$source" ;; esac
# Results have no cache: the host and the other guests look at them.
case $results in /tmp/*) mkdir -p "$root$results" "$root$shared" ;; esac
mount --bind /vm/results "$root$results"
mount --bind /vm/shared "$root$shared"

# virtme-ng names the port for output by udev, which is not here.
for path in /sys/class/virtio-ports/*; do
    if [ "$(cat "$path/name")" = virtme.stdout ]; then export VM_OUTPUT="/dev/${path##*/}"; fi
done
trap - EXIT
exec chroot $root /bin/bash "$source/tests/vm/guest/start.sh" "$results"
