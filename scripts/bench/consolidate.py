"""Consolidating DeepSpeed's ZeRO checkpoints: llmtune's stream against DeepSpeed's own conversion,
both to bf16 safetensors.

    python scripts/bench/consolidate.py                  # a random 1.2B Llama, ZeRO 2 and 3, of 2
    ranks python scripts/bench/consolidate.py --size 0.2B      # a small one

The checkpoints are written with torch.save in DeepSpeed's layout: fp32 master weights of each rank,
of the optimizer's state nothing else (neither side reads it), and under ZeRO 2 the model's bf16
weights, as DeepSpeed stores them. Every conversion is a process of its own. Measured are the
seconds of the call, imports apart, and the peak of anonymous memory (RssAnon, 50 times a second,
from start to end, imports included; mapped files are not in it: the kernel takes those pages back
when it wants). llmtune's seconds contain hashing and flushing every file to the disk; DeepSpeed
does neither. Checkpoints are in the page cache as far as it holds them. Every tensor's bits are
compared. Ends with 1 if a target was missed. Needs 13 GB of disk for 1.2B.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from watch import anonymous, run_watched

HIDDEN, INNER, VOCAB, KV = 2048, 5632, 32000, 512
LAYERS = {"0.2B": 1, "0.4B": 6, "1.2B": 24}
RANKS = 2

#: Targets: our peak as a part of DeepSpeed's, by stage.
MOST = {2: 0.25, 3: 1.0}

#: Elements that are drawn at once.
_DRAWN = 1 << 22


def shapes(layers: int) -> list[OrderedDict[str, torch.Size]]:
    """Two groups of parameters, with and without weight decay: name -> shape."""
    decayed, plain = OrderedDict(), OrderedDict()
    decayed["model.embed_tokens.weight"] = torch.Size((VOCAB, HIDDEN))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        attention = {
            "q": (HIDDEN, HIDDEN),
            "k": (KV, HIDDEN),
            "v": (KV, HIDDEN),
            "o": (HIDDEN, HIDDEN),
        }
        mlp = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
        for name, shape in attention.items():
            decayed[f"{prefix}.self_attn.{name}_proj.weight"] = torch.Size(shape)
        for name, shape in mlp.items():
            decayed[f"{prefix}.mlp.{name}_proj.weight"] = torch.Size(shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain[f"{prefix}.{name}.weight"] = torch.Size((HIDDEN,))
    plain["model.norm.weight"] = torch.Size((HIDDEN,))
    decayed["lm_head.weight"] = torch.Size((VOCAB, HIDDEN))
    return [decayed, plain]


@contextlib.contextmanager
def drawn(folder: Path, numel: int, dtype: torch.dtype, seed: int) -> Iterator[torch.Tensor]:
    """Random numbers in a mapped file, so that none of them are in memory of their own."""
    file = folder / "numbers"
    with file.open("wb") as opened:
        opened.truncate(max(1, numel) * dtype.itemsize)
    numbers = torch.from_file(str(file), shared=True, size=numel, dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    for first in range(0, numel, _DRAWN):
        part = numbers[first : first + _DRAWN]
        part.copy_(torch.randn(part.numel(), generator=draw).mul_(0.02))
    try:
        yield numbers
    finally:
        file.unlink()


def write_checkpoint(folder: Path, layers: int, stage: int) -> int:
    """What DeepSpeed's ``save_checkpoint`` would write; the number of parameters."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    groups = shapes(layers)
    step = folder / "global_step1"
    step.mkdir(parents=True)
    (folder / "latest").write_text(step.name)
    numels = [[math.prod(shape) for shape in group.values()] for group in groups]
    if stage == 3:
        sizes = [sum(math.ceil(numel / RANKS) for numel in group) for group in numels]
    else:
        sizes = [math.ceil(sum(group) / (2 * RANKS)) * 2 for group in numels]
    for rank in range(RANKS):
        with drawn(folder, sum(sizes), torch.float32, rank) as numbers:
            # The last rank's filling is not stored.
            lean = [
                min(size, sum(group) - rank * size) if stage < 3 else size
                for size, group in zip(sizes, numels, strict=True)
            ]
            flats = [part[:kept] for part, kept in zip(numbers.split(sizes), lean, strict=True)]
            key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            state = {
                "zero_stage": ZeroStageEnum(stage),
                "partition_count": RANKS if stage == 3 else [RANKS] * len(groups),
                key: flats,
            }
            if stage < 3:
                state["param_alignment_paddings"] = [[0] * len(group) for group in groups]
            torch.save(
                {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"},
                step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
    write_model_states(step, groups, stage)
    return sum(map(sum, numels))


def write_model_states(step: Path, groups: list[OrderedDict[str, torch.Size]], stage: int) -> None:
    """Names and shapes; under ZeRO 2 with the whole model in bf16, under ZeRO 3 with
    placeholders.
    """
    whole = OrderedDict((name, shape) for group in groups for name, shape in group.items())
    numels = [0 if stage == 3 else math.prod(shape) for shape in whole.values()]
    with drawn(step, sum(numels), torch.bfloat16, RANKS) as numbers:
        parts = zip(whole.items(), numbers.split(numels), strict=True)
        module = OrderedDict(
            (name, part if stage == 3 else part.view(shape)) for (name, shape), part in parts
        )
        model = {
            "module": module,
            "buffer_names": [],
            "param_shapes": groups,
            "shared_params": {},
            "frozen_param_shapes": {},
            "frozen_param_fragments": {},
            "ds_version": "0.19.8",
        }
        for rank in range(RANKS if stage == 3 else 1):
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            torch.save(model, step / f"{name}_model_states.pt")


def run_llmtune(checkpoint: Path, output: Path) -> float:
    """Our side."""
    from llmtune.export.progress import ProgressCallbacks
    from llmtune.export.publish.shards import Journal, write_shards
    from llmtune.export.sources.deepspeed.zero_source import ZeroSource
    from llmtune.export.sources.tensor_source import RetypedSource

    started = time.perf_counter()
    output.mkdir()
    source = RetypedSource(ZeroSource(checkpoint), torch.bfloat16)
    write_shards(source, output, 5_000_000_000, Journal(output, "bench"), ProgressCallbacks())
    return time.perf_counter() - started


def run_deepspeed(checkpoint: Path, output: Path) -> float:
    """The peer's."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    started = time.perf_counter()
    convert_zero_checkpoint_to_state_dict(
        str(checkpoint), str(output), dtype="bf16", safe_serialization=True
    )
    return time.perf_counter() - started


SIDES = {"llmtune": run_llmtune, "deepspeed": run_deepspeed}


def measure(side: str, checkpoint: Path, output: Path) -> dict[str, Any]:
    """One conversion in a process of its own, and its peak of anonymous memory."""
    command = [sys.executable, __file__, "--side", side, str(checkpoint), str(output)]
    found: dict[str, Any] = run_watched(command, anonymous, DS_ACCELERATOR="cpu")
    return found


def differing(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many tensors were compared, and those whose dtype, shape or bits differ."""
    found, expected = open_all(one), open_all(other)
    different = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        a, b = found[name].get_tensor(name), expected[name].get_tensor(name)
        if (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not torch.equal(a.view(torch.int16), b.view(torch.int16))
        ):
            different.append(name)
    return len(found), different


def open_all(folder: Path) -> dict[str, Any]:
    """Tensor -> the file that holds it."""
    from safetensors import safe_open

    files: list[Any] = [
        safe_open(str(file), framework="pt") for file in sorted(folder.glob("*.safetensors"))
    ]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping


def compare(root: Path, size: str, stage: int, repeats: int) -> bool:
    """One stage; whether its targets were reached."""
    checkpoint = root / f"zero-{stage}"
    parameters = write_checkpoint(checkpoint, LAYERS[size], stage)
    nbytes = sum(file.stat().st_size for file in checkpoint.rglob("*.pt"))
    print(
        f"\nZeRO {stage}, {RANKS} ranks, {parameters / 1e9:.2f} B parameters, {nbytes / 1e9:.1f} GB"
        " of files",
        flush=True,
    )
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    compared, different = 0, ["nothing was compared"]
    for turn in range(repeats):
        for side in list(SIDES) if turn % 2 == 0 else list(SIDES)[::-1]:
            shutil.rmtree(root / side, ignore_errors=True)
            found[side].append(measure(side, checkpoint, root / side))
        compared, different = differing(*(root / side for side in SIDES))
        if different:
            break
    shutil.rmtree(checkpoint)
    print(f"{'':<12}{'seconds':>9}{'peak anon MB':>14}")
    peaks = {}
    for side, results in found.items():
        peaks[side] = max(result["peak_bytes"] for result in results)
        seconds = statistics.median(result["seconds"] for result in results)
        print(f"{side:<12}{seconds:>9.1f}{peaks[side] / 1e6:>14,.0f}")
    share = peaks["llmtune"] / peaks["deepspeed"]
    same = f"{compared} tensors, {len(different)} differ {different[:3] if different else ''}"
    print(f"{'FAIL' if different else 'PASS'}  bit-identical: {same}")
    print(
        f"{'PASS' if share <= MOST[stage] else 'FAIL'}  peak {share:.2f} of DeepSpeed's, at most"
        f" {MOST[stage]}",
        flush=True,
    )
    return not different and share <= MOST[stage]


def main() -> int:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(LAYERS), default="1.2B")
    parser.add_argument("--stage", type=int, choices=list(MOST), nargs="*", default=list(MOST))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where the files are written; a temporary folder without"
    )
    parser.add_argument(
        "--side", nargs=3, metavar=("SIDE", "CHECKPOINT", "OUTPUT"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.side:
        side, checkpoint, output = arguments.side
        print("\n" + json.dumps({"seconds": SIDES[side](Path(checkpoint), Path(output))}))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        print(f"{os.cpu_count()} cores, {arguments.repeats} times: median seconds, largest peak")
        reached = [
            compare(Path(root), arguments.size, stage, arguments.repeats)
            for stage in arguments.stage
        ]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
