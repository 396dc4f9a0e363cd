"""The loss of a large vocabulary: llmtune's, in the output projection, against others.

    python scripts/bench/loss.py                       # 2,048 positions of 128,256 words
    python scripts/bench/loss.py --trained             # the projection is trained, too
    python scripts/bench/loss.py --dtype bfloat16 --device cuda

Each side runs alone, forward and backward pass, in a process of its own. ``logits`` is the loss of
transformers' trainers: all logits, converted to fp32, and torch's cross entropy. ``torch`` is
``torch.nn.functional.linear_cross_entropy``, where torch has it. Measured is the median time of
``--repeats`` passes, and the peak of memory above weights and hidden states, per logit: on a CPU
that of the resident memory, on a GPU the allocator's. The error is the largest difference of the
gradient of the hidden states from that of fp64, relative to the largest number in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

SIDES = ("llmtune", "logits", "torch")
COLUMNS = ("side", "seconds", "bytes a logit", "loss", "error")


def loss_of_logits(hidden: Any, weight: Any, values: Any) -> Any:
    """Return the loss that transformers' trainers compute."""
    return F.cross_entropy(F.linear(hidden, weight).float(), values, reduction="sum")


def loss_in_head(hidden: Any, weight: Any, values: Any) -> Any:
    """Return llmtune's loss."""
    from llmtune.task.language_head.chunked_loss import HeadLossSettings, sum_head_losses

    return sum_head_losses(hidden, weight, None, values, HeadLossSettings())[0]


def loss_of_torch(hidden: Any, weight: Any, values: Any) -> Any:
    """Return torch's own fused loss."""
    return F.linear_cross_entropy(hidden, weight, values, reduction="sum")


FUNCTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "llmtune": loss_in_head,
    "logits": loss_of_logits,
    "torch": loss_of_torch,
}


def peak_bytes(device: str) -> int:
    """Return the most memory that this process has had."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def exact_gradient(hidden: Any, weight: Any, values: Any) -> Any:
    """Return the gradient of some hidden states in fp64."""
    exact = hidden.detach().double().requires_grad_()
    loss_of_fp64 = F.cross_entropy(F.linear(exact, weight.double()), values, reduction="sum")
    (gradient,) = torch.autograd.grad(loss_of_fp64, exact)
    return gradient


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one side in this process."""
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype, device = getattr(torch, options.dtype), options.device
    shape = (options.positions, options.width)
    hidden = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = torch.randn(options.words, options.width, device=device) / options.width**0.5
    weight = weight.to(dtype).requires_grad_(options.trained)
    values = torch.randint(0, options.words, (options.positions,), device=device)
    FUNCTIONS[side](hidden[:2], weight[:16], values[:2] % 16).backward()

    before = peak_bytes(device)
    seconds = []
    for _ in range(options.repeats):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        loss = FUNCTIONS[side](hidden, weight, values)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = peak_bytes(device) - before
    assert hidden.grad is not None
    few = slice(0, 64)
    exact = exact_gradient(hidden[few], weight.detach(), values[few])
    error = (hidden.grad[few].double() - exact).abs().max() / exact.abs().max()
    return {
        "seconds": statistics.median(seconds),
        "bytes a logit": peak / options.positions / options.words,
        "loss": float(loss.detach()),
        "error": float(error),
    }


def parse() -> argparse.Namespace:
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--side", choices=SIDES)
    return parser.parse_args()


def main() -> int:
    """Run every side, and print a row for each and the ratio of llmtune's time to it."""
    options = parse()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return 0
    print("  ".join(f"{name:>14}" for name in (*COLUMNS, "llmtune's time")))
    ours = 0.0
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{side:>14}  {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        ours = ours or found["seconds"]
        numbers = [found[name] for name in COLUMNS[1:]]
        texts = [side, *(f"{number:.4g}" for number in numbers), f"{ours / found['seconds']:.2f} x"]
        print("  ".join(f"{text:>14}" for text in texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
