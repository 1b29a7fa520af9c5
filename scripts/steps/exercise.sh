#!/usr/bin/env bash
# Random operations against models, and POSIX line by line, on one mount and on three.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

start_cluster
open_way
ONE=(--mount "$DIR/mnt/0")
OTHER=(--mount "$DIR/mnt/2") # of the root directory's files it is not the home
mkdir "$DIR/reference"

# What a stock mount cannot do on any kernel, or cannot do on this one; a check that is skipped without standing here fails.
MAY_SKIP=(
    --may-skip temporary_file_without_name # O_TMPFILE: fuser 0.18 has no FUSE_TMPFILE, the kernel answers EOPNOTSUPP
    --may-skip no_space_arrives_at_write   # wants --fill; space.sh fills a cluster small enough for it
)

check posix_three_mounts 200 "$BIN/verbfs-posix" "${MOUNTS[@]}" --strict "${MAY_SKIP[@]}"
check posix_one_mount 120 "$BIN/verbfs-posix" "${OTHER[@]}" --strict "${MAY_SKIP[@]}"
for seed in ${SEEDS:-1 2 3}; do
    check "exerciser_one_mount_$seed" 60 "$BIN/verbfs-exerciser" "${ONE[@]}" --seed "$seed" --operations 1500
    check "exerciser_other_mount_$seed" 60 "$BIN/verbfs-exerciser" "${OTHER[@]}" --seed "$seed" --operations 1500
    check "exerciser_three_mounts_$seed" 60 "$BIN/verbfs-exerciser" "${MOUNTS[@]}" --seed "$seed" --operations 1500
    check "names_one_mount_$seed" 60 "$BIN/verbfs-namespace-exerciser" "${OTHER[@]}" --reference "$DIR/reference" --seed "$seed" --operations 2000
    check "names_three_mounts_$seed" 60 "$BIN/verbfs-namespace-exerciser" "${MOUNTS[@]}" --reference "$DIR/reference" --seed "$seed" --operations 2000
done
check daemons_live 5 alive
if stop_cluster; then pass cluster_stops_well; else fail cluster_stops_well 'see above'; fi
finish
