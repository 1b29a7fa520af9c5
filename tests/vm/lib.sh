# shellcheck shell=bash disable=SC2034
# Where the virtual machines' things lie, and how a console is judged. Sourced in the root of the source tree.

VM_CACHE=$(realpath -m "${CARGO_TARGET_DIR:-target}/vm")
VM_VIRTME=$VM_CACHE/virtme/bin/virtme-run

# What no command of a guest returns by itself; documented in run.sh.
VM_STATUS_WARNING=120
VM_STATUS_ENDED=121
VM_STATUS_HANG=124
VM_STATUS_BED=125

vm_complain() { printf 'vm: %s\n' "$*" >&2; }

vm_kernel_release() {
    local directory
    for directory in "$VM_CACHE"/kernel/lib/modules/*; do
        [ ! -s "$directory/modules.dep" ] || basename "$directory"
    done
}

# Says which programs are missing, and the packages that bring them.
vm_missing_programs() {
    local program package missing=()
    while read -r program package; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" > /dev/null || missing+=("$package")
    done << 'END'
qemu-system-x86_64 qemu-system-x86
/usr/bin/python3 python3
busybox busybox-static
depmod kmod
file file
ip iproute2
rdma iproute2
rping rdmacm-utils
ib_write_bw perftest
ibv_devices ibverbs-utils
END
    /usr/bin/python3 -c 'import ensurepip' 2> /dev/null || missing+=(python3-venv)
    dpkg-query -W -f '${db:Status-Status}' ibverbs-providers 2> /dev/null | grep -qx installed || missing+=(ibverbs-providers)
    [ ${#missing[@]} != 0 ] || return 0
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    echo "vm: packages are missing: ${missing[*]}"
    echo "vm: scripts/packages.sh test installs them; or, as root: apt-get install ${missing[*]}"
    return 1
}

# Lines of a console that no healthy kernel prints. Most begin the message, so that a message which only mentions one of
# these words does not count; the time and the thread that printk puts in front are skipped.
VM_BAD_CONSOLE='^(<[0-9]+>)?(\[ *[0-9]+\.[0-9]+\] *)?(\[ *[TC][0-9]+\] *)?('
VM_BAD_CONSOLE+='WARNING:|BUG:|Oops|kernel BUG at|Kernel panic|general protection fault|traps: .* general protection'
VM_BAD_CONSOLE+='|watchdog: BUG|NMI watchdog: (BUG|Watchdog detected)|rcu: INFO: .*(stall|starved)|INFO: rcu.*stall|INFO: task .* blocked for more than'
VM_BAD_CONSOLE+='|INFO: (trying to register|possible|lockdep|inconsistent)|INFO: possible (recursive|circular|irq)'
VM_BAD_CONSOLE+='|UBSAN:|KASAN:|KCSAN:|kmemleak:|unchecked MSR|Unable to handle|unregister_netdevice: waiting'
VM_BAD_CONSOLE+='|(list_add|list_del) corruption|refcount_t:|Bad page|stack segment:|divide error:|invalid opcode:|double fault:'
VM_BAD_CONSOLE+='|Out of memory:|.* invoked oom-killer|.*: page allocation failure|Call Trace:|Modules linked in:)'

# vm_bad_lines CONSOLE [ALLOWED]: the lines that condemn it, at most twenty; status 1 if there are none.
vm_bad_lines() {
    local found
    found=$(tr -d '\r\000' < "$1" | grep -aE "$VM_BAD_CONSOLE" || true)
    [ -z "${2:-}" ] || found=$(grep -avE "$2" <<< "$found" || true)
    [ -n "$found" ] || return 1
    head -20 <<< "$found"
}
