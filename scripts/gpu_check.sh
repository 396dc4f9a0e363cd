#!/usr/bin/env bash
# The first hour on a GPU: every placement, precision and way through llmtune with small models, each a real run that is
# compared with the same run on the CPU; docs/gpu.md says what each check shows. Safe to run again; it leaves one JSON file.
#
#   bash scripts/gpu_check.sh                       on one card, or on all of one machine
#   bash scripts/gpu_check.sh --only 'placement/*'  some of the checks; --list names them
#   bash scripts/gpu_check.sh --cpu                 with the CPU in the GPU's place
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m scripts.gpu_check "$@"
