"""Loading a model in bf16 on 2 ranks under ZeRO 3: llmtune's slices against transformers' path.

    DS_ACCELERATOR=cpu python scripts/bench/zero3_load.py                 # a random 1.2B Llama
    DS_ACCELERATOR=cpu python scripts/bench/zero3_load.py --size 0.4B     # a small one

Both sides start from the same bf16 safetensors, and end with a model whose weights are partitioned
over the ranks. Under ZeRO 3 transformers reads all weights on every rank, and copies them into the
gathered parameters from rank 0. The sides alternate, ``--times`` times each. Measured on every
rank: the seconds of the load, the peak of anonymous memory above what the process had before it
(RssAnon, 100 times a second; pages of mapped files are not in it), and the bytes of the parameters
that it keeps. Prints medians of the worse rank, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_sides import RANKS, Peak, join_transformers, kept_bytes, run_side
from merge import LAYERS, write_base


def load_llmtune(folder: Path, meeting: Path) -> dict[str, float]:
    """Read and keep this rank's slices."""
    from llmtune.config.compose import compose_config
    from llmtune.engine.distributed import gather_rows, init_ranks
    from llmtune.engine.train_module import zero_init
    from llmtune.model.build import WeightsTo, build_model
    from llmtune.plan.resolve import resolve_plan

    rank = init_ranks(meeting=meeting)
    job = [f"model.name_or_path={folder}", "tuner=lora", "zero=3", "offload=none"]
    job += ["data.train=stdlib_docs@10", "precision=bf16", "data.max_seq_length=128"]
    config = compose_config(job).config
    plan = resolve_plan(config, RANKS)
    weights = WeightsTo(partitioned=lambda: zero_init(plan.deepspeed), rank=rank.rank)
    # The first collective call allocates buffers.
    gather_rows(torch.zeros(1), rank)
    import transformers.models.llama.modeling_llama  # noqa: F401

    peak, started = Peak(), time.monotonic()
    model = build_model(folder, config.model, config.precision, "eager", weights)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak_bytes": peak.stop(), "kept_bytes": kept_bytes(model)}


def load_transformers(folder: Path, meeting: Path) -> dict[str, float]:
    """Let transformers build the model in slices and load its weights into them."""
    from transformers import AutoModelForCausalLM

    # transformers asks it whether ZeRO 3 is on, as long as it lives.
    _, alive = join_transformers(meeting)
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.distributed.all_reduce(torch.zeros(1))
    peak, started = Peak(), time.monotonic()
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    seconds = time.monotonic() - started
    del alive
    return {"seconds": seconds, "peak_bytes": peak.stop(), "kept_bytes": kept_bytes(model)}


SIDES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "llmtune": load_llmtune,
    "transformers": load_transformers,
}


def compare(size: str, times: int, root: Path) -> None:
    """Print the medians of each side, and their ratios."""
    base = root / size
    write_base(base, LAYERS[size])
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(times):
        for side in SIDES:
            ranks = run_side(__file__, side, base, root)
            runs[side].append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    medians = {
        side: {key: statistics.median(run[key] for run in of_side) for key in of_side[0]}
        for side, of_side in runs.items()
    }
    for side, found in medians.items():
        print(
            f"{side:<13} {found['seconds']:6.2f} s   peak {found['peak_bytes'] / 1e6:7.0f} MB  "
            f" kept {found['kept_bytes'] / 1e6:7.0f} MB"
        )
    ours, theirs = medians["llmtune"], medians["transformers"]
    print(
        f"{size}, {RANKS} ranks, medians of {times}: llmtune takes"
        f" {ours['seconds'] / theirs['seconds']:.2f} of the time and"
        f" {ours['peak_bytes'] / theirs['peak_bytes']:.2f} of the peak"
    )


def main() -> int:
    """Compare, or be one rank of a side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(LAYERS), default="1.2B")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument(
        "--side", nargs=3, metavar=("SIDE", "MODEL", "MEETING"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.side:
        side, folder, meeting = arguments.side
        print("\n" + json.dumps(SIDES[side](Path(folder), Path(meeting))), flush=True)
        # Not through DeepSpeed's destructors.
        os._exit(0)
    with tempfile.TemporaryDirectory() as root:
        compare(arguments.size, arguments.times, Path(root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
