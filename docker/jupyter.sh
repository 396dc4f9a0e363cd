#!/usr/bin/env bash
# Start JupyterLab. The token comes from the environment, where neither ps nor the image shows it, and there is no start without.
set -euo pipefail
token=${JUPYTER_TOKEN:-}
if [ "${#token}" -lt 16 ]; then
    printf 'error: JUPYTER_TOKEN is missing or has less than 16 characters: whoever reaches this port could run any program here.\n%s\n' \
        "Make one with: openssl rand -hex 24" >&2
    exit 7
fi
exec jupyter lab --no-browser --ip=0.0.0.0 --port=8888 --ServerApp.root_dir=/workspace --ServerApp.allow_remote_access=true "$@"
