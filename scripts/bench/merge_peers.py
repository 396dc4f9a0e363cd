"""Other tools' merges, for ``merge.py``: how their environments are made, and one call of each.

    PEER_PYTHON merge_peers.py NAME BASE ADAPTER OUTPUT      # merge once, print seconds as JSON

Each peer has an environment of its own, so that this file imports nothing of llmtune. What is timed
is load + merge + save; imports come before. The files are flushed to the disk afterwards, timed
apart: no peer does it by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from watch import anonymous, anonymous_bytes, run_watched

SHARD = "2GB"

#: What all of them need, in llmtune's versions where the peer takes them. torch is installed first
#: and alone, so that the build that pip finds by itself (a CPU build, where one lies on the disk)
#: stays.
_TORCH = ["torch==2.13.0"]
_OURS = ["transformers==5.23.0", "peft==0.21.2", "safetensors==0.8.0", "accelerate==1.15.0"]

#: Name -> what pip installs with dependencies, then what it installs without, which is the peer.
ENVIRONMENTS: dict[str, tuple[list[str], list[str]]] = {
    "axolotl": (
        [*_OURS, "colorama", "click", "pydantic", "requests", "pyyaml"],
        ["axolotl==0.19.0"],
    ),
    "mergekit": (
        [
            *_OURS,
            "click",
            "pydantic",
            "immutables",
            "scipy",
            "datasets",
            "sentencepiece",
            "protobuf",
        ],
        ["mergekit==0.1.5"],
    ),
}


def make_environments(folder: Path) -> None:
    """One virtual environment a peer below ``folder``; those that are there and start are left as
    they are.
    """
    for name, (needed, peer) in ENVIRONMENTS.items():
        if is_ready(folder, name):
            print(f"{name}: {folder / name} is there")
            continue
        venv.EnvBuilder(with_pip=True, clear=True).create(folder / name)
        pip = [
            python_of(folder, name),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        for arguments in (_TORCH, [*needed, *_TORCH], ["--no-deps", *peer]):
            subprocess.run([*pip, *arguments], check=True)
        print(
            f"{name}: {'made' if is_ready(folder, name) else 'DOES NOT START in'} {folder / name}",
            flush=True,
        )


def python_of(folder: Path, name: str) -> str:
    """The interpreter of a peer."""
    return str(folder / name / "bin" / "python")


def is_ready(folder: Path, name: str) -> bool:
    """Whether a peer's environment is there and its merge can be imported."""
    if not Path(python_of(folder, name)).exists():
        return False
    command = [python_of(folder, name), __file__, name]
    return (
        subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


def open_peft() -> Callable[[Path, Path, Path], None]:
    """The whole model in memory, in the dtype it is stored in."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - so that it is not timed
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def merge(base: Path, adapter: Path, output: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(
            str(output), max_shard_size=SHARD
        )
        AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(output))

    return merge


def open_axolotl() -> Callable[[Path, Path, Path], None]:
    """What ``axolotl merge-lora`` calls for ``merge_method: memory_efficient``; the command wants
    all of its dependencies.
    """
    import transformers.models.llama.modeling_llama  # noqa: F401
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
    from transformers import AutoModelForCausalLM  # noqa: F401

    def merge(base: Path, adapter: Path, output: Path) -> None:
        merge_lora_sharded_efficient(
            base_model_path=base,
            lora_adapter_path=adapter,
            output_path=output,
            device="cpu",
            safe_tensors=True,
        )

    return merge


def open_mergekit() -> Callable[[Path, Path, Path], None]:
    """``mergekit-yaml`` with a passthrough of ``base+adapter``: peft's merge, stored, and written
    once more.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def merge(base: Path, adapter: Path, output: Path) -> None:
        config = {
            "models": [{"model": f"{base}+{adapter}"}],
            "merge_method": "passthrough",
            "dtype": "bfloat16",
        }
        cache = output.with_name(output.name + "-cache")
        options = MergeOptions(
            lora_merge_cache=str(cache), lora_merge_dtype="bfloat16", copy_tokenizer=True,
            out_shard_size=int(2e9), lazy_unpickle=True, device="cpu",
        )  # fmt: skip
        run_merge(MergeConfiguration.model_validate(config), str(output), options)

    return merge


OPEN = {"peft": open_peft, "axolotl": open_axolotl, "mergekit": open_mergekit}


def flush_files(folder: Path) -> float:
    """Seconds until every file of a folder is on the disk."""
    started = time.perf_counter()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def measure(command: list[str]) -> dict[str, Any]:
    """Run one merge and watch its memory.

    Raises:
        RuntimeError: It failed.
    """
    os.sync()
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "AXOLOTL_DO_NOT_TRACK": "1"}
    started = time.perf_counter()
    found = run_watched(command, anonymous, **quiet)
    return {**found, "process_seconds": time.perf_counter() - started}


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Every tensor's name, with dtype, shape and bits."""
    import torch
    import xxhash
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_tensor(name)
                bits = xxhash.xxh3_128(
                    tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                ).hexdigest()
                yield name, f"{tensor.dtype} {tuple(tensor.shape)} {bits}"


def main() -> None:
    """Merge once, or with the name alone show that it could."""
    name, *folders = sys.argv[1:]
    merge = OPEN[name]()
    if not folders:
        return
    base, adapter, output = map(Path, folders)
    import_bytes = anonymous_bytes(os.getpid())
    started, cpu = time.perf_counter(), time.process_time()
    merge(base, adapter, output)
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    found |= {"flush_seconds": flush_files(output), "import_bytes": import_bytes}
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
