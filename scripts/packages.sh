#!/usr/bin/env bash
# The Debian 12 packages that verbfs needs, and the Rust toolchain.
#
#   scripts/packages.sh [build] [run] [demo] [test]    default: all groups
#
# Prints what is needed, installs what is missing (as root, by apt-get).
#   VERBFS_NO_INSTALL=1   only check, and say what is missing
# Exit status: 0 everything is there; 3 something is missing and was not installed.
set -euo pipefail

# One line per package: group, package, what it is for.
packages() {
    cat <<'END'
build  gcc          compiles the embedded store (LMDB) and links
build  libc6-dev    headers of the C library
build  make         runs the targets of the Makefile
build  pkg-config   finds hwloc and the RDMA libraries
build  libhwloc-dev cores and caches of this machine
build  libibverbs-dev  headers of the RDMA verbs
build  librdmacm-dev   headers of the RDMA connection manager
build  libclang-dev    reads those headers when bindings are made from them
build  cmake        configures the copy of rdma-core that ibverbs brings along
build  python3      asked for by that configuration
run    fuse3        fusermount3, and the fuse entry of /etc/fuse.conf
run    procps       ps, for people who look at daemons
run    libibverbs1  RDMA verbs; used only where the fabric is RDMA, linked always
run    librdmacm1   RDMA connection manager, likewise
run    ibverbs-providers  drivers of RDMA devices, the software device's among them
demo   tar          unpacking a source tree onto a mount
demo   gcc          compiling a source tree on a mount
demo   make         building a source tree on a mount
test   attr         setfattr and getfattr on mounts
test   acl          setfacl and getfacl on mounts
test   fio          verified random input and output
test   sqlite3      a database on a mount
test   git          a repository on a mount
test   rsync        a copy onto a mount
test   tar          unpacking a source tree onto a mount
test   gcc          compiling a source tree on a mount
test   make         building a source tree on a mount
test   strace       counting system calls
test   qemu-system-x86 virtual machines; emulated, so that no /dev/kvm is needed
test   python3         runs virtme-ng, which boots them
test   python3-venv    an environment for virtme-ng of its own
test   busybox-static  their initial ramdisk
test   kmod            lists and loads their modules
test   udev            finds their devices
test   file            reads the version of their kernel
test   iproute2        network interfaces and software RDMA devices inside
test   rdmacm-utils    rping
test   perftest        ib_write_bw and its like
test   ibverbs-utils   ibv_devices
test   ibverbs-providers  the software RDMA device, for programs
test   ca-certificates fetching virtme-ng
END
}

RUST_NEEDED=1.90 # the MSRV of Cargo.toml

say() { printf '%s\n' "$*"; }
complain() { printf 'packages: %s\n' "$*" >&2; }

groups=("$@")
[ ${#groups[@]} -gt 0 ] || groups=(build run demo test)
for group in "${groups[@]}"; do
    case $group in
        build | run | demo | test) ;;
        *)
            complain "unknown group '$group'; the groups are build, run, demo and test"
            exit 2
            ;;
    esac
done

list() { packages | awk -v group="$1" '$1 == group { print $2 }' | xargs; }

installed() {
    dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed
}

# Rust: found in PATH or where rustup puts it; Debian 12's own (1.63) is too old.
check_rust() {
    PATH=$PATH:${HOME:-/root}/.cargo/bin
    local found=
    if command -v cargo >/dev/null && command -v rustc >/dev/null; then
        found=$(rustc --version | awk '{ print $2 }')
        if printf '%s\n%s\n' "$RUST_NEEDED" "$found" | sort -V -C; then
            say "Rust $found ($RUST_NEEDED or later is needed)"
            return 0
        fi
        complain "Rust $found is too old: $RUST_NEEDED or later is needed"
    else
        complain "cargo and rustc were not found: Rust $RUST_NEEDED or later is needed"
    fi
    complain "Debian 12's own Rust (1.63) will not do. Get a recent one with rustup (https://rustup.rs):"
    complain "  apt-get install curl && curl https://sh.rustup.rs -sSf | sh -s -- -y --profile default"
    complain "  . \"\$HOME/.cargo/env\""
    return 1
}

say "verbfs needs these Debian packages:"
missing=()
for group in "${groups[@]}"; do
    say "  for $group: $(list "$group")"
    if command -v dpkg-query >/dev/null; then
        for package in $(list "$group"); do
            installed "$package" || [[ " ${missing[*]} " == *" $package "* ]] || missing+=("$package")
        done
    fi
done

status=0
if ! command -v dpkg-query >/dev/null; then
    complain "this is not a Debian system, so nothing was checked: install the counterparts of the packages above"
    complain "(verbfs was never run on other distributions)"
elif [ ${#missing[@]} -eq 0 ]; then
    say "all of them are installed"
elif [ "${VERBFS_NO_INSTALL:-0}" = 1 ]; then
    say "missing: ${missing[*]}"
    complain "VERBFS_NO_INSTALL=1: nothing installed; as root: apt-get install ${missing[*]}"
    status=3
elif [ "$(id -u)" != 0 ]; then
    say "missing: ${missing[*]}"
    complain "only root can install them; as root: apt-get install ${missing[*]}"
    status=3
else
    say "installing: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # The lists of a fresh machine are empty or old: a failing install is tried again behind an update.
    done=
    for attempt in 1 2 3 4; do
        if apt-get install -y --no-install-recommends "${missing[@]}" </dev/null; then
            done=yes
            break
        fi
        [ "$attempt" = 4 ] && break
        complain "attempt $attempt failed; updating the package lists"
        [ "$attempt" = 1 ] || sleep $((attempt * 5))
        apt-get update </dev/null || complain "apt-get update failed"
    done
    if [ -z "$done" ]; then
        complain "apt-get could not install ${missing[*]}: see its messages above, put it right, run this again"
        status=3
    fi
fi

# Only those who build need Rust.
if [[ " ${groups[*]} " == *" build "* ]]; then
    check_rust || status=3
fi
exit $status
