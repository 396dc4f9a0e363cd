#!/usr/bin/env bash
# Lint, types, tests. Arguments that follow go to pytest: `bash scripts/test.sh -k parity`.
#
#   bash scripts/test.sh          the ordinary suite: at most 15 minutes on 2 cores
#   bash scripts/test.sh --fast   those of it that start no process: at most 3 minutes, for after each change
#   bash scripts/test.sh --slow   the rest: full products of all variants, and real runs broken in every way of
#                                 docs/reliability.md, whose table it prints at the end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

tier=
case "${1:-}" in --fast | --slow)
    tier=$1
    shift
    ;;
esac

if [ "$tier" = --slow ]; then
    table="${LLMTUNE_FAULT_TABLE:-$PWD/outputs/faults.jsonl}"
    mkdir -p "$(dirname "$table")"
    status=0
    LLMTUNE_FAULT_TABLE="$table" .venv/bin/python -m pytest -m slow "$@" || status=$?
    .venv/bin/python -m tests.faults.table "$table"
    exit "$status"
fi

printf '== lint\n'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
printf '== types\n'
.venv/bin/mypy
# Without arguments of its own a tier is whole, and has a budget of seconds.
budget() { if [ "$#" -gt 1 ]; then echo ""; else echo "$1 $began"; fi; }
began=$(date +%s)
cores=$(nproc)
workers=$((cores < 8 ? cores : 8))

printf '== tests that start no process\n'
status=0
LLMTUNE_SUITE_BUDGET=$([ "$tier" != --fast ] || budget 180 "$@") \
    .venv/bin/python -m pytest -n "$workers" -m 'not process and not slow' "$@" || status=$?
if [ "$tier" != --fast ]; then
    printf '== tests that start processes\n'
    more=0
    # File by file, since the tests of one share their runs. One test leaves half of two cores idle, and two of them do not.
    LLMTUNE_SUITE_BUDGET=$(budget 900 "$@") \
        .venv/bin/python -m pytest -n "$workers" --dist loadfile -m 'process and not slow' "$@" || more=$?
    # 5: what was asked for is all in the other half.
    if [ "$status" = 5 ]; then
        status=$more
    elif [ "$more" != 5 ]; then
        status=$((status > more ? status : more))
    fi
fi
exit "$status"
