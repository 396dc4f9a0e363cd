#!/usr/bin/env bash
# Ask PyPI's advisory database about every locked package; exit code 1 where one is known to be vulnerable. Needs the network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
.venv/bin/python -m venv "$tools/venv"
"$tools/venv/bin/pip" install -q pip-audit
"$tools/venv/bin/pip-audit" --requirement requirements-dev.lock --require-hashes --disable-pip --progress-spinner off
