"""Loading a model in 4 bits on 2 ranks under ZeRO 3: llmtune's slices against transformers' path.

    DS_ACCELERATOR=cpu python scripts/bench/qlora_load.py                 # a random 1.2B Llama
    DS_ACCELERATOR=cpu python scripts/bench/qlora_load.py --size 0.4B     # a small one

Both sides start from the same bf16 safetensors, and end with a model whose weights are partitioned
over the ranks. transformers quantizes the whole model on every rank, as its trainers do under ZeRO
3, and DeepSpeed partitions it afterwards. Measured on every rank: the peak of anonymous memory
(RssAnon, 100 times a second; pages of mapped files are not in it) above what the process had before
it began to load, with every library imported and one weight quantized; and the bytes of the
parameters that the rank keeps, beside those that llmtune plans. Ends with 1 if llmtune's peak is
above its target, which is half the model in 4 bits, the largest tensor in 16, and 15 % more, or if
it keeps 1 % more or less than planned.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from load_sides import RANKS, Peak, join_transformers, kept_bytes, run_side
from merge import HIDDEN, LAYERS, VOCAB, write_base

#: Targets: what may be held beside half of the model and its largest tensor, and how far the bytes
#: that are kept may be from the plan.
SLACK, APART = 0.15, 0.01

LARGEST_BYTES = VOCAB * HIDDEN * 2


def quantize_once() -> None:
    """Load the kernels before anything is measured."""
    from llmtune.model.nf4.nf4_slices import load_bitsandbytes

    load_bitsandbytes().quantize_4bit(torch.ones(64, dtype=torch.bfloat16), quant_type="nf4")


def load_llmtune(folder: Path, meeting: Path) -> dict[str, float]:
    """Read, quantize and keep this rank's slices."""
    from functools import partial

    from llmtune.config.compose import compose_config
    from llmtune.engine.distributed import gather_rows, init_ranks
    from llmtune.engine.train_module import zero_init
    from llmtune.model.build import WeightsTo, build_model
    from llmtune.model.nf4.nf4_model import In4Bits
    from llmtune.plan.resolve import resolve_plan

    rank = init_ranks(meeting=meeting)
    job = [f"model.name_or_path={folder}", "tuner=qlora", "zero=3", "offload=none"]
    job += ["data.train=stdlib_docs@10", "precision=bf16", "data.max_seq_length=128"]
    config = compose_config(job).config
    plan = resolve_plan(config, RANKS)
    quantize_once()
    in_4_bits = In4Bits(
        config.tuner.bnb_4bit_use_double_quant, rank.device, partial(gather_rows, rank=rank)
    )
    weights = WeightsTo(
        partitioned=lambda: zero_init(plan.deepspeed), rank=rank.rank, in_4_bits=in_4_bits
    )
    # The first collective call allocates buffers.
    gather_rows(torch.zeros(1), rank)
    import transformers.models.llama.modeling_llama  # noqa: F401

    peak, started = Peak(), time.monotonic()
    model = build_model(folder, config.model, config.precision, "eager", weights)
    seconds = time.monotonic() - started
    return {
        "peak_bytes": peak.stop(),
        "seconds": seconds,
        "kept_bytes": kept_bytes(model),
        "planned_bytes": plan.memory.device.weights,
    }


def load_transformers(folder: Path, meeting: Path) -> dict[str, float]:
    """Load the whole model in 4 bits, then let DeepSpeed partition it."""
    import deepspeed
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # transformers asks it whether ZeRO 3 is on, as long as it lives.
    settings, alive = join_transformers(meeting)
    import transformers.models.llama.modeling_llama  # noqa: F401

    quantize_once()
    peak, started = Peak(), time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
    )
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    del model, alive
    seconds = time.monotonic() - started
    return {
        "peak_bytes": peak.stop(),
        "seconds": seconds,
        "kept_bytes": kept_bytes(engine.module),
    }


SIDES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "llmtune": load_llmtune,
    "transformers": load_transformers,
}


def compare(size: str, root: Path) -> bool:
    """Print a row for each side; tell whether llmtune has reached its targets."""
    base = root / size
    write_base(base, LAYERS[size])
    ours, theirs = (run_side(__file__, side, base, root) for side in ("llmtune", "transformers"))
    whole = sum(rank["kept_bytes"] for rank in ours)
    target = (1 + SLACK) * (whole / RANKS + LARGEST_BYTES)
    print(f"{size}: {whole / 1e6:.0f} MB in 4 bits; target of the peak {target / 1e6:.0f} MB")
    for side, ranks in (("llmtune", ours), ("transformers", theirs)):
        for kind in ("peak_bytes", "kept_bytes", "planned_bytes"):
            if kind in ranks[0]:
                shown = ", ".join(f"{rank[kind] / 1e6:.0f}" for rank in ranks)
                print(f"{side:<13} {kind.partition('_')[0]:<8} {shown} MB")
        print(f"{side:<13} load     {max(rank['seconds'] for rank in ranks):.1f} s")
    most = max(rank["peak_bytes"] for rank in ours)
    ratio = most / max(rank["peak_bytes"] for rank in theirs)
    print(f"llmtune's peak is {ratio:.2f} of transformers'")
    apart = max(abs(rank["kept_bytes"] / rank["planned_bytes"] - 1) for rank in ours)
    print(f"kept and planned bytes are {100 * apart:.2f} % apart")
    return bool(most <= target and apart <= APART)


def main() -> int:
    """Compare, or be one rank of a side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(LAYERS), default="1.2B")
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
        return 0 if compare(arguments.size, Path(root)) else 1


if __name__ == "__main__":
    sys.exit(main())
