#!/usr/bin/env bash
# Lint, types, tests. Arguments go to pytest: `bash scripts/test.sh -k parity`.
# `bash scripts/test.sh --faults` breaks real runs in every way of docs/reliability.md instead; that takes more than an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

if [[ "${1:-}" == --faults ]]; then
    shift
    table="${LLMTUNE_FAULT_TABLE:-$PWD/outputs/faults.jsonl}"
    mkdir -p "$(dirname "$table")"
    status=0
    LLMTUNE_FAULT_TABLE="$table" .venv/bin/python -m pytest -m faults tests/faults tests/checkpoint "$@" || status=$?
    .venv/bin/python -m tests.faults.table "$table"
    exit "$status"
fi

printf '== lint\n'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
printf '== types\n'
.venv/bin/mypy
printf '== tests\n'
.venv/bin/python -m pytest "$@"
