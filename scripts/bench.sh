#!/usr/bin/env bash
# Runs scripts/bench/*.sh one after the other; each measures all sides of its comparison in one run
# and prints Markdown. What they print becomes docs/BENCHMARKS.md, headed by the machine's description.
set -euo pipefail
cd "$(dirname "$0")/.."

shopt -s nullglob
benches=(scripts/bench/*.sh)
if [ ${#benches[@]} -eq 0 ]; then
    echo "bench: there are no benchmarks yet (scripts/bench/ holds none)" >&2
    exit 1
fi

# Not built by `make build`, which makes no examples.
scripts/cargo.sh build --release -p verbfs-rdma --example pingpong >&2

result=$(mktemp)
trap 'rm -f "$result"' EXIT
{
    echo "# Benchmarks"
    echo
    echo "Written by \`make bench\` on $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)."
    echo
    echo "| machine | |"
    echo "|---|---|"
    echo "| processor | $(awk -F': *' '/^model name/ { print $2; exit }' /proc/cpuinfo), $(nproc) CPUs |"
    echo "| memory | $(awk '/^MemTotal/ { printf "%.1f GiB", $2 / 1048576 }' /proc/meminfo) |"
    echo "| kernel | Linux $(uname -r) |"
    echo "| compiler | $(rustc --version) |"
} >"$result"
for bench in "${benches[@]}"; do
    echo "bench: $bench" >&2
    echo >>"$result"
    "$bench" </dev/null >>"$result"
done
# Prose that people wrote about the figures is kept: it stands behind this line.
mark='<!-- written by people from here on -->'
{
    echo
    if [ -e docs/BENCHMARKS.md ] && grep -qxF -- "$mark" docs/BENCHMARKS.md; then
        sed -n "/^$mark\$/,\$p" docs/BENCHMARKS.md
    else
        echo "$mark"
    fi
} >>"$result"
install -m 644 "$result" docs/BENCHMARKS.md
echo "bench: wrote docs/BENCHMARKS.md" >&2
