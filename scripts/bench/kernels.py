"""Faster kernels of ``model.kernels=torch`` against the modules of transformers and peft.

    python scripts/bench/kernels.py                                   # fp32 on one core of the CPU
    python scripts/bench/kernels.py --dtype bfloat16 --device cuda --tokens 8192 --width 4096

Each row is forward and backward pass of one module, with the weight of a norm frozen as in LoRA.
The two sides take turns, and the median of ``--repeats`` is taken; a ratio above 1 says that the
replacement is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmtune.model.kernels.lora_sum import find_sums
from llmtune.model.kernels.replacement import Replacement
from llmtune.model.kernels.rms_norm import find_norms

COLUMNS = ("module", "plain s", "replaced s", "ratio")


def make_norm(options: argparse.Namespace) -> torch.nn.Module:
    """Build a norm as Llama's models have it."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(options.width, 1e-5)
    return norm.requires_grad_(options.trained)


def make_lora(options: argparse.Namespace) -> torch.nn.Module:
    """Build a linear layer with an adapter, whose width grows as in an MLP."""
    from peft import LoraConfig, get_peft_model

    layer = torch.nn.Sequential(torch.nn.Linear(options.width, 3 * options.width, bias=False))
    settings = LoraConfig(r=options.rank, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(layer, settings)


def time_once(compute: Callable[..., Any], inputs: torch.Tensor) -> float:
    """Return the seconds of a forward and a backward pass."""
    if inputs.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = compute(inputs)
    result.backward(torch.ones_like(result))
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(replacement: Replacement, inputs: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Return the median seconds of the plain module and of its replacement."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for use, own in zip((replacement.drop, replacement.use), seconds, strict=True):
            use()
            module: Any = replacement.plain.__self__  # type: ignore[attr-defined]
            taken = time_once(module, inputs)
            # The first turn allocates memory and, on a GPU, loads kernels.
            if turn:
                own.append(taken)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both kinds and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trained", action="store_true", help="the norm's weight is trained")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    if options.device == "cpu":
        from llmtune.cpu_products import multiply_in_fp32

        multiply_in_fp32()
    rows = []
    for make in (make_norm, make_lora):
        module = make(options).to(device, dtype)
        found = [*find_norms(module, dtype, device), *find_sums(module, dtype, device)]
        hidden = torch.randn(1, options.tokens, options.width, device=device).to(dtype)
        plain, replaced = measure(found[0], hidden.requires_grad_(), options.repeats)
        rows.append((found[0].kind, plain, replaced, plain / replaced))
    if options.json:
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows]))
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for kind, plain, replaced, ratio in rows:
        print(f"| {kind} | {plain:.5f} | {replaced:.5f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
