#!/usr/bin/env bash
# Runs a command in a virtual machine: stock Debian 12 kernel, SoftRoCE device rxe0 on eth0, emulated by QEMU without KVM.
#
#   tests/vm/run.sh [options] COMMAND [ARGUMENT...]
#
#   --memory SIZE      memory of a guest                                   default: 1536M
#   --cpus N           processors of a guest                               default: 2
#   --limit SECONDS    from the start of the guest to its end              default: 300
#   --results DIR      keep results here (emptied first)                   default: target/vm/results/last
#   --allow PATTERN    lines of the console that are no complaint (extended regular expression)
#   --verbose          show the console as well
#
# The guest's root is this host's root, read-only: programs and the source tree are where they are on the host, the working
# directory is the caller's. /tmp, /run, /dev/shm and /var/tmp are the guest's own memory. In the guest's environment stand
#   VM_RESULTS    a writable directory of the host; it stays as DIR/1/
#   VM_ADDRESS    the guest's address, 198.18.0.1; the RDMA device is rxe0
# The command's output is printed here (both streams as one) and kept in DIR/1/output, the kernel's in DIR/1/console.
#
# Exit status: the command's, unless
#   120  the kernel complained: a warning, an oops, a stall, a hung task; the lines are shown
#   121  the guest ended before the command did: a panic, a power-off
#   124  the limit passed
#   125  the guest could not be started or set up; a command that returns one of these says so itself in DIR/1/status
set -euo pipefail
VM_DIRECTORY=$PWD
cd "$(dirname "$0")/../.."
# shellcheck source=tests/vm/lib.sh
. tests/vm/lib.sh

memory=1536M cpus=2 limit=300 results=$VM_CACHE/results/last allow='' verbose=''
usage() { sed -n '2,/^set -euo/ { /^#/ s/^# \{0,1\}//p }' tests/vm/run.sh; exit "$1"; }
die() { vm_complain "$*"; exit $VM_STATUS_BED; }
while [ $# -gt 0 ]; do
    case $1 in
        --memory | --cpus | --limit | --results | --allow)
            [ $# -ge 2 ] || die "$1 needs a value; see tests/vm/run.sh --help"
            declare "${1#--}=$2"
            shift 2
            ;;
        --verbose) verbose=yes; shift ;;
        -h | --help) usage 0 ;;
        --) shift; break ;;
        -*) die "unknown option '$1'; see tests/vm/run.sh --help" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || usage 2
[[ $limit =~ ^[1-9][0-9]*$ ]] || die "--limit takes seconds, not '$limit'"
results=$(realpath -m "$results")
# virtme-ng takes no other names of directories.
[[ $results =~ ^[a-zA-Z0-9_+\ /.-]+$ ]] || die "--results: only letters, digits, blanks and _ + - . / can stand in '$results'"

tests/vm/prepare.sh > /dev/null || exit $VM_STATUS_BED
release=$(vm_kernel_release)
[ -n "$release" ] || die "no kernel in $VM_CACHE/kernel"

guest=$results/1
rm -rf "$guest"
mkdir -p "$guest"
VM_COMMAND=("$@") VM_RESULTS=$guest VM_ADDRESS=198.18.0.1 VM_SOURCE=$PWD
{
    declare -p VM_COMMAND VM_DIRECTORY VM_SOURCE
    declare -px VM_RESULTS VM_ADDRESS | sed 's/^declare -- /declare -x /'
    [ -z "${CARGO_TARGET_DIR:-}" ] || declare -px CARGO_TARGET_DIR
} > "$guest/environment"

arguments=(
    --kimg "$VM_CACHE/kernel/boot/vmlinuz-$release" --mods auto
    --force-9p --disable-kvm --disable-microvm --memory "$memory" --cpus "$cpus" --name guest1
    "--rwdir=$guest=$guest"
    # All guests use the host's time stamp counter, which TCG hands through.
    --kopt tsc=reliable --kopt mitigations=off --kopt loglevel=7
    # Starved by other programs of the host, guests stand still for seconds: that is no stall of theirs.
    --kopt rcupdate.rcu_cpu_stall_timeout=60 --kopt nmi_watchdog=0 --kopt watchdog_thresh=30
)
# shellcheck disable=SC2054 # the commas are QEMU's
devices=(
    -nodefaults
    # AVX is slow in TCG, and programs would choose it.
    -cpu Nehalem,+rdtscp
    -netdev hubport,id=network,hubid=0 -device virtio-net-pci,netdev=network,mac=52:54:00:12:34:01
)
script="exec bash '$PWD/tests/vm/guest/start.sh' '$guest'"

pid=
# Ends what we started, by its process group: virtme-run and QEMU below it.
end_guest() {
    [ -z "$pid" ] || kill -KILL -- "-$pid" 2> /dev/null || true
    [ -z "$pid" ] || wait "$pid" 2> /dev/null || true
    pid=
}
trap end_guest EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# virtme-ng keeps nothing outside of our directory.
export HOME=$VM_CACHE/home
mkdir -p "$HOME"
started=$SECONDS
set -m
"$VM_VIRTME" "${arguments[@]}" --show-boot-console --script-sh "$script" --qemu-opts "${devices[@]}" \
    < /dev/null > "$guest/output" 2> "$guest/console" &
pid=$!
set +m
tail -q -c +1 -f "--pid=$pid" "$guest/output" &
follower=$!
hung=
while kill -0 "$pid" 2> /dev/null; do
    if [ $((SECONDS - started)) -ge "$limit" ]; then
        hung=yes
        end_guest
        break
    fi
    sleep 0.2
done
[ -z "$pid" ] || wait "$pid" || true
pid=
wait $follower 2> /dev/null || true
if [ -n "$verbose" ]; then sed 's/^/console: /' "$guest/console"; fi

if bad=$(vm_bad_lines "$guest/console" "$allow"); then
    vm_complain "the kernel complained; its console is $guest/console"
    printf '%s\n' "$bad" | sed 's/^/    /' >&2
    grep -aq 'Kernel panic' <<< "$bad" && exit $VM_STATUS_ENDED
    exit $VM_STATUS_WARNING
fi
if [ -n "$hung" ]; then
    vm_complain "no end after $limit s; the console, $guest/console, ends with"
    tail -5 "$guest/console" | sed 's/^/    /' >&2
    exit $VM_STATUS_HANG
fi
if ! [ -e "$guest/ready" ]; then
    vm_complain "the guest did not come up; its console, $guest/console, ends with"
    tail -15 "$guest/console" | sed 's/^/    /' >&2
    exit $VM_STATUS_BED
fi
if ! [ -s "$guest/status" ]; then
    vm_complain "the guest ended before the command did; its console, $guest/console, ends with"
    tail -5 "$guest/console" | sed 's/^/    /' >&2
    exit $VM_STATUS_ENDED
fi
exit "$(cat "$guest/status")"
