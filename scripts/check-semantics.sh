#!/usr/bin/env bash
# Every test that docs/semantics.md names exists in the source.
#
# A line of a table there reads `| promise | test |`. The test column holds one or more names in
# backquotes, or the word `planned`. A name is a Rust function below rdma/, fsd/ or tests/, or a
# script scripts/steps/NAME.sh. `--planned` lists the promises without a test.
set -euo pipefail
cd "$(dirname "$0")/.."

DOCUMENT=docs/semantics.md
bad=0 promises=0 planned=0
complain() {
    printf '%s: %s\n' "$DOCUMENT" "$*" >&2
    bad=$((bad + 1))
}

while IFS= read -r line; do
    promise=$(awk -F' *\\| *' '{ print $2 }' <<<"$line")
    tests=$(awk -F' *\\| *' '{ print $3 }' <<<"$line")
    [[ $promise == promise || $promise == -* ]] && continue
    promises=$((promises + 1))
    if [[ $tests == planned* ]]; then
        planned=$((planned + 1))
        [ "${1:-}" = --planned ] && printf 'planned: %s\n' "$promise"
        continue
    fi
    # shellcheck disable=SC2016 # the backquotes are meant
    mapfile -t found < <(grep -o '`[^`]*`' <<<"$tests" | tr -d '`')
    [ ${#found[@]} -gt 0 ] || complain "no test is named for: $promise"
    for test in "${found[@]}"; do
        [ -e "scripts/steps/$test.sh" ] && continue
        grep -rqw --include='*.rs' -e "fn ${test##*::}" rdma fsd tests ||
            complain "test '$test' does not exist, named for: $promise"
    done
done < <(grep '^|' "$DOCUMENT")

[ "$promises" -gt 0 ] || complain "holds no table of promises"
printf '%d promises, %d of them planned, %d objections\n' "$promises" "$planned" "$bad"
[ "$bad" -eq 0 ]
