#!/usr/bin/env bash
# Runs a command in one virtual machine or in several at once: stock Debian 12 kernel, a SoftRoCE device rxe0 on eth0,
# emulated by QEMU without KVM.
#
#   tests/vm/run.sh [options] COMMAND [ARGUMENT...]
#   tests/vm/run.sh [options] --shell
#
#   --guests N            how many guests, 1 to 9; each runs the command          default: 1
#   --memory SIZE         memory of each guest                                    default: 1536M
#   --cpus N              processors of each guest                                default: 2 for one guest, else 1
#   --limit SECONDS       for the command, from when all guests are up            default: 300
#   --boot-limit SECONDS  until all guests are up                                 default: 240
#   --results DIR         keep results here (emptied first)                       default: target/vm/results/last
#   --allow PATTERN       lines of a console that are no complaint (extended regular expression)
#   --independent         a guest that fails does not end the others
#   --shell               a prompt in one guest, instead of a command
#
# The command's root is this host's root, read-only: programs and the source tree are where they are on the host, the working
# directory is the caller's. What changes on the host while a guest runs, it may not see. /tmp, /run, /dev/shm and /var/tmp
# are the guest's own memory. There is no init system, no udev and no login: the command runs as root. Guests reach each other, and nothing else. In the environment of the command stand
#   VM_GUEST VM_GUESTS VM_BOOT   this guest's number from 1, the number of guests, how often this one was started
#   VM_ADDRESS                   this guest's address, 198.18.0.VM_GUEST; the names guest1, guest2... work too
#   VM_RESULTS                   a directory of the host, writable; it stays as DIR/VM_GUEST
#   VM_SHARED                    the same, one for all guests; it stays as DIR/shared
#   VERBFS_CLOCK                 the time base that all guests share, see docs/vm.md
# and in PATH are vm-barrier, vm-link and vm-control; they explain themselves at their top.
#
# The command's output is printed here, both streams as one, and kept in DIR/N/output, the console's in DIR/N/console, what
# became of the guest in DIR/N/verdict; those of a guest's earlier starts in output.before and console.before.
#
# Exit status: that of the command, of the guest that failed first if there are several, unless
#   120  the kernel complained: a warning, an oops, a stall, a hung task; the lines are shown
#   121  the guest ended before the command did: a panic, a power-off
#   124  the command did not end within its limit
#   125  a guest could not be started or did not come up
set -euo pipefail
VM_DIRECTORY=$PWD
cd "$(dirname "$0")/../.."
# shellcheck source=tests/vm/lib.sh
. tests/vm/lib.sh

GUESTS_MOST=9        # addresses and sockets have one digit for the guest
GRACE=10             # seconds for the other guests to end by themselves when one has failed
CLOCK_SIZE=64K       # the shared memory of the time base; a power of two

guests=1 memory=1536M cpus='' limit=300 boot_limit=240 results=$VM_CACHE/results/last allow='' independent='' shell=''
usage() { sed -n '2,/^set -euo/ { /^#/ s/^# \{0,1\}//p }' tests/vm/run.sh; exit "$1"; }
die() { vm_complain "$*"; exit $VM_STATUS_BED; }
while [ $# -gt 0 ]; do
    case $1 in
        --guests | --memory | --cpus | --limit | --boot-limit | --results | --allow)
            [ $# -ge 2 ] || die "$1 needs a value; see tests/vm/run.sh --help"
            name=${1#--}
            declare "${name//-/_}=$2"
            shift 2
            ;;
        --independent) independent=yes; shift ;;
        --shell) shell=yes; shift ;;
        -h | --help) usage 0 ;;
        --) shift; break ;;
        -*) die "unknown option '$1'; see tests/vm/run.sh --help" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || [ -n "$shell" ] || usage 2
for name in guests limit boot_limit; do
    [[ ${!name} =~ ^[1-9][0-9]{0,5}$ ]] || die "--${name//_/-} takes a number from 1, not '${!name}'"
done
[ "$guests" -le $GUESTS_MOST ] || die "--guests: $GUESTS_MOST at most"
if [ -z "$cpus" ]; then cpus=$((guests == 1 ? 2 : 1)); fi
results=$(cd "$VM_DIRECTORY" && realpath -m "$results")
# virtme-ng takes no other names of directories.
[[ $results =~ ^[a-zA-Z0-9_+\ /.-]+$ ]] || die "--results: only letters, digits, blanks and _ + - . / can stand in '$results'"

tests/vm/prepare.sh > /dev/null || exit $VM_STATUS_BED
release=$(vm_kernel_release)
[ -n "$release" ] || die "no kernel in $VM_CACHE/kernel"

# Sockets have short names only relative to this directory, whose own name may be too long for one.
run=$results/run
rm -rf "${results:?}"/[1-9] "$results/shared" "$run"
mkdir -p "$results/shared/control" "$run/tmp"

# For each guest: its process group while it runs, and how often it was started.
pids=() boots=()
# Process groups of the switch, of what shows the guests' output, and of the guardian.
switch='' followers=() guardian=
# How the terminal was, if a guest has it.
terminal=
# The status of the guest that failed first, and when that was.
first='' first_at=0

# end_group PID: ends what we started, virtme-run and QEMU below it.
end_group() {
    kill -TERM -- "-$1" 2> /dev/null || return 0
    local try
    for try in {1..20}; do
        kill -0 -- "-$1" 2> /dev/null || return 0
        sleep 0.1
    done
    echo "process group $1 did not end in $((try / 10)) s" >> "$run/log"
    kill -KILL -- "-$1" 2> /dev/null || true
}
# shellcheck disable=SC2317 # called by the trap
end_all() {
    local group
    trap '' INT TERM HUP
    for group in "${pids[@]}" "$switch" "${followers[@]}"; do [ -z "$group" ] || end_group "$group"; done
    [ -z "$terminal" ] || stty "$terminal" 2> /dev/null || true
    [ -z "$guardian" ] || kill -KILL -- "-$guardian"
}
trap end_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Ends what was started if this script is killed and cannot.
guard() {
    set -m
    (
        trap '' INT TERM HUP
        while kill -0 $$; do sleep 1; done
        while read -r group; do kill -KILL -- "-$group"; done < "$run/groups"
    ) > /dev/null 2>&1 < /dev/null &
    guardian=$!
    set +m
}

# start_switch: a QEMU without a machine joins the guests' sockets. A guest may come and go.
start_switch() {
    # shellcheck disable=SC2054 # the commas are QEMU's
    local n arguments=(-machine none -nodefaults -display none)
    for ((n = 1; n <= guests; n++)); do
        arguments+=(-netdev "stream,id=wire$n,server=on,addr.type=unix,addr.path=switch$n"
            -netdev "hubport,id=port$n,hubid=0,netdev=wire$n")
    done
    mkfifo "$run/switch.in" "$run/switch.out"
    arguments+=(-chardev "pipe,id=monitor,path=switch" -mon "chardev=monitor,mode=control")
    set -m
    (cd "$run" && exec qemu-system-x86_64 "${arguments[@]}") > "$run/switch.log" 2>&1 < /dev/null &
    switch=$!
    set +m
    echo "$switch" >> "$run/groups"
    for n in {1..100}; do
        [ ! -S "$run/switch$guests" ] || break
        if [ "$n" = 100 ] || ! kill -0 "$switch" 2> /dev/null; then
            die "the switch does not start: $(cat "$run/switch.log")"
        fi
        sleep 0.1
    done
    monitor switch qmp_capabilities
}

# monitor NAME COMMAND [ARGUMENTS]: tells a QEMU something, in JSON.
monitor() {
    local message="{\"execute\": \"$2\"${3:+, \"arguments\": $3}}"
    # shellcheck disable=SC2016 # the inner shell expands its own arguments
    timeout 5 bash -c 'printf "%s\n" "$1" > "$2.in"' - "$message" "$run/$1" || vm_complain "$1 does not take $2"
}

# start_guest N: in the background; what it says goes to files of its directory.
start_guest() {
    local n=$1 guest=$results/$1 arguments devices network
    boots[n]=$((${boots[n]:-0} + 1))
    mkdir -p "$guest"
    rm -f "$guest/ready" "$guest/status" "$guest/verdict" "$guest/killed" "$run/guest$n.in" "$run/guest$n.out"
    mkfifo "$run/guest$n.in" "$run/guest$n.out"
    # QEMU begins both anew.
    if [ "${boots[n]}" != 1 ]; then
        cat "$guest/console" >> "$guest/console.before"
        cat "$guest/output" >> "$guest/output.before"
    fi
    touch "$guest/console" "$guest/output"
    VM_GUEST=$n VM_GUESTS=$guests VM_BOOT=${boots[n]} VM_ADDRESS=198.18.0.$n VM_RESULTS=$guest VM_SHARED=$results/shared
    VM_SOURCE=$PWD VM_SHELL=$shell
    {
        declare -p VM_COMMAND VM_DIRECTORY VM_SOURCE VM_SHELL
        declare -px VM_GUEST VM_GUESTS VM_BOOT VM_ADDRESS VM_RESULTS VM_SHARED | sed 's/^declare -- /declare -x /'
        [ -z "${CARGO_TARGET_DIR:-}" ] || declare -px CARGO_TARGET_DIR
        [ -z "${TERM:-}" ] || declare -px TERM
        [ -z "$shell" ] || declare -p VM_ROWS VM_COLUMNS
    } > "$guest/environment"

    # For busybox's shell, which knows no `declare`.
    printf '%s=%q\n' VM_SOURCE "$VM_SOURCE" VM_RESULTS "$VM_RESULTS" VM_SHARED "$VM_SHARED" > "$guest/places"
    cp tests/vm/guest/boot.sh "$guest/boot"
    arguments=(
        --kimg "$VM_CACHE/kernel/boot/vmlinuz-$release" --root "$VM_CACHE/kernel" --mods auto
        --force-9p --disable-kvm --disable-microvm --memory "$memory" --cpus "$cpus" --name "guest$n"
        "--rwdir=/vm/results=$guest" "--rwdir=/vm/shared=$results/shared"
        # The time stamp counter is the host's, and its rate is measured while booting: on a loaded host sometimes at a
        # sixteenth, and then the guest's time runs sixteen times too fast. The HPET's rate is known, and is right.
        --kopt clocksource=hpet --kopt tsc=unstable
        --kopt mitigations=off --kopt loglevel=7
        # Starved by other programs of the host, a guest stands still for seconds: that is no stall of its own.
        --kopt rcupdate.rcu_cpu_stall_timeout=60 --kopt nmi_watchdog=0 --kopt watchdog_thresh=30
        --show-boot-console --script-sh 'exec sh /vm/results/boot'
    )
    network="stream,id=network,server=off,addr.type=unix,addr.path=switch$n"
    # A wire that ends nowhere.
    if [ "$guests" = 1 ]; then network=hubport,id=network,hubid=0; fi
    # shellcheck disable=SC2054 # the commas are QEMU's
    devices=(
        -nodefaults
        # AVX is slow in TCG, and programs would choose it.
        -cpu Nehalem,+rdtscp
        -netdev "$network" -device "virtio-net-pci,netdev=network,mac=52:54:00:12:34:0$n"
        -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap
        -device virtio-9p-pci,fsdev=host,mount_tag=verbfs.host
        -object "memory-backend-file,id=clock,share=on,mem-path=$run/clock,size=$CLOCK_SIZE"
        -device ivshmem-plain,memdev=clock
        -chardev "pipe,id=control,path=guest$n" -mon chardev=control,mode=control
    )
    # shellcheck disable=SC2054 # the commas are QEMU's
    if [ -n "$shell" ]; then
        devices+=(-chardev "serial,id=terminal,path=$(tty)" -device virtio-serial-pci -device virtconsole,chardev=terminal)
    fi
    # virtme-ng keeps nothing outside of our directories.
    local -x HOME=$VM_CACHE/home TMPDIR=$run/tmp
    mkdir -p "$HOME"
    if [ -n "$shell" ]; then
        # In the foreground: only there may it read from the terminal.
        touch "$results/shared/go"
        (cd "$run" && exec "$VM_VIRTME" "${arguments[@]}" --qemu-opts "${devices[@]}") \
            < /dev/null > "$guest/output" 2>> "$guest/console" || true
        return
    fi
    set -m
    (cd "$run" && exec "$VM_VIRTME" "${arguments[@]}" --qemu-opts "${devices[@]}") \
        < /dev/null >> "$guest/output" 2>> "$guest/console" &
    pids[n]=$!
    set +m
    echo "${pids[n]}" >> "$run/groups"
    if [ "${boots[n]}" = 1 ]; then
        set -m
        (tail -n +1 -f "$guest/output" | if [ "$guests" = 1 ]; then cat; else sed -u "s/^/$n: /"; fi) 2> /dev/null &
        followers+=("$!")
        set +m
        echo "$!" >> "$run/groups"
    fi
    monitor "guest$n" qmp_capabilities
}

# conclude N HUNG: what became of a guest that has ended, or was ended since it hung.
conclude() {
    local n=$1 hung=$2 guest=$results/$1 code verdict bad=''
    if bad=$(vm_bad_lines "$guest/console" "$allow") && ! grep -aq 'Kernel panic' <<< "$bad"; then
        code=$VM_STATUS_WARNING verdict="the kernel complained"
    elif [ -n "$bad" ]; then
        code=$VM_STATUS_ENDED verdict="the kernel panicked"
    elif [ -n "$hung" ] && [ -e "$guest/ready" ]; then
        code=$VM_STATUS_HANG verdict="the command did not end within $limit s" bad=$(tail -5 "$guest/console")
    elif [ -e "$guest/killed" ]; then
        code=0 verdict="killed, as it was asked for"
    elif ! [ -e "$guest/ready" ]; then
        code=$VM_STATUS_BED verdict="the guest did not come up" bad=$(tail -15 "$guest/console")
    elif ! [ -s "$guest/status" ]; then
        code=$VM_STATUS_ENDED verdict="the guest ended before the command did" bad=$(tail -5 "$guest/console")
    else
        code=$(cat "$guest/status") verdict="the command returned $code"
    fi
    printf '%s %s\n' "$code" "$verdict" > "$guest/verdict"
    pids[n]=
    [ "$code" != 0 ] || return 0
    if [ -z "$first" ]; then first=$code first_at=$SECONDS; fi
    [ "$verdict" != "the command returned $code" ] || return 0
    vm_complain "guest $n: $verdict; its console, $guest/console, has"
    printf '%s\n' "$bad" | tr -d '\r' | sed 's/^/    /' >&2
}

# What guests ask of the host through vm-control.
serve_control() {
    local request verb n
    for request in "$results"/shared/control/*.request; do
        [ -e "$request" ] || return 0
        read -r verb n < "$request" || true
        if [[ $n =~ ^[1-9]$ ]] && [ "$n" -le "$guests" ]; then
            case $verb in
                kill)
                    touch "$results/$n/killed"
                    [ -z "${pids[n]}" ] || end_group "${pids[n]}"
                    ;;
                start) [ -n "${pids[n]}" ] || start_guest "$n" ;;
                stop) monitor "guest$n" stop ;;
                cont) monitor "guest$n" cont ;;
                unplug) monitor switch set_link "{\"name\": \"wire$n\", \"up\": false}" ;;
                plug) monitor switch set_link "{\"name\": \"wire$n\", \"up\": true}" ;;
                *) vm_complain "a guest asked for '$verb $n', which is nothing" ;;
            esac
        fi
        mv "$request" "${request%.request}.done"
    done
}

if [ -n "$shell" ]; then
    [ -t 0 ] || die "--shell needs a terminal"
    [ "$guests" = 1 ] || die "--shell is for one guest"
    set -- bash -i
    terminal=$(stty -g)
    # In the guest the same size; what is typed goes there, ^C too.
    read -r VM_ROWS VM_COLUMNS < <(stty size)
    echo "the guest starts; its console is $results/1/console; leave with exit or ^D"
fi
VM_COMMAND=("$@")
truncate -s "$CLOCK_SIZE" "$run/clock"
guard
if [ -n "$shell" ]; then
    start_guest 1
    conclude 1 ''
    exit "${first:-0}"
fi
[ "$guests" = 1 ] || start_switch
began=$SECONDS
for ((n = 1; n <= guests; n++)); do start_guest "$n"; done

went=
while :; do
    running=0 ready=0
    for ((n = 1; n <= guests; n++)); do
        [ ! -e "$results/$n/ready" ] || ready=$((ready + 1))
        [ -n "${pids[n]}" ] || continue
        if ! kill -0 "${pids[n]}" 2> /dev/null; then
            wait "${pids[n]}" || true
            conclude "$n" ''
        else
            running=$((running + 1))
        fi
    done
    [ $running != 0 ] || [ -n "$(compgen -G "$results/shared/control/*.request")" ] || break
    if [ -z "$went" ] && [ $ready = "$guests" ]; then
        went=$SECONDS
        touch "$results/shared/go"
    fi
    serve_control
    late=
    if [ -z "$went" ]; then
        [ $((SECONDS - began)) -lt "$boot_limit" ] || late=yes
    else
        [ $((SECONDS - went)) -lt "$limit" ] || late=yes
    fi
    abandoned=
    if [ -z "$independent" ] && [ -n "$first" ] && [ $((SECONDS - first_at)) -ge $GRACE ]; then abandoned=yes; fi
    if [ -n "$late$abandoned" ]; then
        for ((n = 1; n <= guests; n++)); do
            [ -n "${pids[n]}" ] || continue
            end_group "${pids[n]}"
            wait "${pids[n]}" || true
            if [ -n "$late" ]; then
                conclude "$n" yes
            else
                echo "0 ended, since another guest had failed" > "$results/$n/verdict"
                pids[n]=
            fi
        done
        break
    fi
    sleep 0.2
done
# What the guests said last is still to be shown.
sleep 1.2
exit "${first:-0}"
