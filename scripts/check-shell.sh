#!/usr/bin/env bash
# Every shell script parses, is strict and is executable; shellcheck agrees where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

bad=0
complain() {
    printf 'check-shell: %s\n' "$*" >&2
    bad=1
}

mapfile -t scripts < <(find scripts tests .ci -type f \( -name '*.sh' -o -path '.ci/run' \) | sort)
for script in "${scripts[@]}"; do
    bash -n "$script" || complain "$script does not parse"
    [ -x "$script" ] || complain "$script is not executable: chmod +x $script"
    case $script in
        */lib.sh | */lib/*) ;; # sourced by scripts that are strict
        *) grep -q '^set -euo pipefail$' "$script" || complain "$script lacks 'set -euo pipefail'" ;;
    esac
done
if command -v shellcheck >/dev/null; then
    shellcheck -x -P SCRIPTDIR "${scripts[@]}" || complain "shellcheck has objections"
else
    echo "shellcheck is not installed: only parsed"
fi
echo "${#scripts[@]} scripts looked at"
exit $bad
