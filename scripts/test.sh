#!/usr/bin/env bash
# Lint, types, tests. Arguments go to pytest: `bash scripts/test.sh -k parity`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

printf '== lint\n'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
printf '== types\n'
.venv/bin/mypy
printf '== tests\n'
.venv/bin/python -m pytest "$@"
