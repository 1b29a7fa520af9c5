#!/usr/bin/env bash
# Gets what the virtual machines need and no package installs: a stock Debian 12 kernel, unpacked and not
# installed, and virtme-ng in a Python environment of its own. Both lie in target/vm and are fetched once.
#
#   tests/vm/prepare.sh             fetch what is missing, print where it is
#   tests/vm/prepare.sh --missing   only say what is missing, packages included; exit status 3 if anything is
#
# Exit status: 0 ready, 3 something is missing and could not be had (the messages say what to do).
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/vm/lib.sh
. tests/vm/lib.sh

case ${1:-} in
    '') ;;
    --missing)
        status=0
        vm_missing_programs || status=3
        [ -n "$(vm_kernel_release)" ] || { echo "the Debian kernel is not unpacked: run tests/vm/prepare.sh"; status=3; }
        [ -x "$VM_VIRTME" ] || { echo "virtme-ng is not installed: run tests/vm/prepare.sh"; status=3; }
        [ $status != 0 ] || echo "nothing is missing"
        exit $status
        ;;
    *) sed -n '2,/^set -euo/ { /^#/ s/^# \{0,1\}//p }' "$0"; exit 2 ;;
esac

vm_missing_programs >&2 || exit 3
mkdir -p "$VM_CACHE"
# One at a time: steps and developers may start at once.
exec 9> "$VM_CACHE/prepare.lock"
flock 9

# retry COMMAND...: package mirrors are sometimes away for a moment.
retry() {
    local attempt
    for attempt in 1 2 3 4; do
        if "$@"; then return 0; fi
        [ "$attempt" = 4 ] || sleep $((attempt * 5))
    done
    return 1
}

get_virtme() {
    rm -rf "$VM_CACHE/virtme"
    /usr/bin/python3 -m venv "$VM_CACHE/virtme"
    "$VM_CACHE/virtme/bin/pip" install --quiet --no-deps --require-hashes -r tests/vm/requirements.txt < /dev/null
}
if ! [ -x "$VM_VIRTME" ] || ! cmp -s tests/vm/requirements.txt "$VM_CACHE/virtme/requirements.txt"; then
    echo "vm: installing virtme-ng" >&2
    if ! retry get_virtme >&2; then
        vm_complain "pip could not install virtme-ng into $VM_CACHE/virtme: see its messages above"
        exit 3
    fi
    cp tests/vm/requirements.txt "$VM_CACHE/virtme/requirements.txt"
fi

kernel_package() { LC_ALL=C apt-cache depends linux-image-amd64 2> /dev/null | grep -o 'linux-image-[0-9][^ ]*-amd64' | head -1; }
download_kernel() {
    local package
    package=$(kernel_package) || true
    if [ -n "$package" ] && (cd "$VM_CACHE/download" && apt-get -q download "$package" < /dev/null); then return 0; fi
    # The lists are empty, or name a package that was replaced by a newer one.
    [ "$(id -u)" != 0 ] || apt-get -q update < /dev/null || true
    return 1
}
# Only what a guest of ours can have. Debian's kernel brings some 4000 modules, and udev would load what fits the emulated
# board: disks, watchdogs, sensors; with these left out, a boot takes a third of the time.
unpack_kernel() {
    local archive=$1 directory=$2 release
    local modules='./lib/modules/*/kernel'
    dpkg-deb --fsys-tarfile "$archive" | tar -x -C "$directory" --wildcards \
        './boot/vmlinuz-*' './boot/config-*' './boot/System.map-*' './lib/modules/*/modules.*' \
        "$modules/fs/*" "$modules/crypto/*" "$modules/lib/*" "$modules/net/*" \
        "$modules/drivers/infiniband/*" "$modules/drivers/virtio/*" "$modules/drivers/block/*" "$modules/drivers/net/*.ko" \
        "$modules/drivers/uio/*" "$modules/drivers/char/virtio_console.ko" "$modules/drivers/nvme/*" "$modules/drivers/md/*" \
        "$modules/drivers/input/serio/*"
    release=$(basename "$directory"/lib/modules/*)
    depmod -b "$directory" "$release"
}
if [ -z "$(vm_kernel_release)" ]; then
    echo "vm: fetching the Debian kernel" >&2
    rm -rf "$VM_CACHE/download" "$VM_CACHE/kernel" "$VM_CACHE/kernel.new"
    mkdir -p "$VM_CACHE/download" "$VM_CACHE/kernel.new"
    if ! retry download_kernel >&2; then
        vm_complain "apt-get download could not get the kernel of linux-image-amd64: see its messages above"
        exit 3
    fi
    unpack_kernel "$VM_CACHE"/download/linux-image-*.deb "$VM_CACHE/kernel.new"
    mv "$VM_CACHE/kernel.new" "$VM_CACHE/kernel"
    rm -r "$VM_CACHE/download"
fi

# The kernel's directory is also the root that guests boot from: a busybox and mount points, no more. On the host's root
# virtme-ng would run udev and systemd-tmpfiles, which take longer than all the rest. It is complete when `layout` says which.
LAYOUT=1
if [ "$(cat "$VM_CACHE/kernel/layout" 2> /dev/null)" != $LAYOUT ]; then
    (
        cd "$VM_CACHE/kernel"
        mkdir -p bin sbin usr/bin usr/sbin dev proc sys run tmp var root vm/results vm/shared etc
        cp "$(command -v busybox)" bin/busybox
        for name in sh mount umount mkdir modprobe insmod cat ls ln ip sleep chroot chown grep hostname poweroff setsid stty touch tr; do
            ln -sf /bin/busybox "bin/$name"
        done
        ln -sf /bin/busybox sbin/modprobe
        echo 'root:x:0:0:root:/root:/bin/sh' > etc/passwd
        echo 'root:x:0:' > etc/group
        touch etc/fstab etc/hosts
        echo $LAYOUT > layout
    )
fi

echo "kernel $(vm_kernel_release) in $VM_CACHE/kernel"
echo "virtme-ng in $VM_CACHE/virtme"
