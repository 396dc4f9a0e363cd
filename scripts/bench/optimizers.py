"""Train SmolLM2-135M fully on 2 ranks with every optimizer, on every rung that it claims, and
compare the losses with those of AdamW in fp32.

    DS_ACCELERATOR=cpu python scripts/bench/optimizers.py [--steps 30] [NAME ...]

That is 21 runs of 30 steps of two rows of 32 tokens, the first ones of Python's own docstrings;
names choose some of the optimizers. Prints the tables of docs/planner.md: how far the losses of an
optimizer are from the reference on the first rung, and how far those of its other rungs are from
the first one's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

#: What all others are compared with. In a bf16 run of AdamW a weight stays as it is until its fp32
#: master weight is half a step of bf16 away.
REFERENCE = ["optim=adamw", "precision=fp32"]

_HOST, _ALL = ("none", "optimizer_cpu", "cpu"), ("none", "optimizer_cpu", "cpu", "optimizer_nvme")

#: Name -> overrides, and rungs.
OPTIMIZERS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "adamw": (["optim=adamw"], (*_ALL, "nvme")),
    "adamw_bf16": (["optim=adamw_bf16"], _HOST),
    "adamw_bf16_kahan": (["optim=adamw_bf16", "optim.rounding=kahan"], _HOST),
    "adamw_bf16_nearest": (["optim=adamw_bf16", "optim.rounding=nearest"], ("none",)),
    "adamw_8bit": (["optim=adamw_8bit"], _HOST),
    "muon": (["optim=muon"], _HOST),
    "adafactor": (["optim=adafactor", "zero=0"], ("none",)),
}
JOB = [
    "model=smollm2_135m",
    "tuner=full",
    "zero=3",
    "precision=bf16",
    "launch.nproc=2",
    "optim.learning_rate=1e-5",
    "data.max_seq_length=32",
    *("data.overlong=truncate", "data.max_overlong_share=1"),
    "data.val_set_size=0",
    "train.global_batch_size=2",
    "train.sample_answers=false",
    *("train.save_steps=null", "export=none"),
]


def write_rows(file: Path) -> Path:
    """Write the docstrings of the functions of some modules as rows of text."""
    modules = (argparse, json, shutil, statistics, subprocess, tempfile)
    texts = {
        inspect.getdoc(value)
        for module in modules
        for value in vars(module).values()
        if inspect.isroutine(value) or inspect.isclass(value)
    }
    rows = [json.dumps({"text": text}) for text in sorted(filter(None, texts)) if len(text) > 200]
    file.write_text("\n".join(rows) + "\n")
    return file


def train(overrides: list[str], rung: str, rows: Path, steps: int) -> list[float]:
    """Train, and return the losses of the steps."""
    folder = Path(tempfile.mkdtemp(dir=rows.parent))
    command = [sys.executable, "-m", "llmtune", "train", *JOB, *overrides, f"offload={rung}"]
    command.append(f"data.train={rows}")
    if rung.endswith("nvme"):
        command.append(f"offload.nvme_path={folder}/nvme")
    command += [f"train.max_steps={steps}", f"output_dir={folder}/run"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def distances(losses: list[float], others: list[float]) -> list[float]:
    """Return how far each loss is from the other run's."""
    return [abs(a - b) for a, b in zip(losses, others, strict=True)]


def say(text: str) -> None:
    """Print now: a run takes minutes."""
    print(text, flush=True)


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(OPTIMIZERS):
        parser.error(f"{min(unknown)} is none of {', '.join(OPTIMIZERS)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl")
        reference = train(REFERENCE, "none", rows, arguments.steps)
        last = reference[-10:]
        say(
            f"reference: losses {reference[0]:.4f} to {reference[-1]:.4f}; mean of the last"
            f" {len(last)} losses {sum(last) / len(last):.4f}"
        )
        own: dict[str, list[float]] = {}
        # First rungs first: the table is of them.
        runs = [(name, rung) for name in arguments.names for rung in OPTIMIZERS[name][1]]
        for name, rung in sorted(runs, key=lambda run: run[1] != OPTIMIZERS[run[0]][1][0]):
            overrides, rungs = OPTIMIZERS[name]
            losses = train(overrides, rung, rows, arguments.steps)
            if rung == rungs[0]:
                own[name] = losses
                apart, last = distances(losses, reference), losses[-10:]
                say(
                    f"{name:<19} {rung:<15} from the reference: largest {max(apart):.4f}, mean"
                    f" {sum(apart) / len(apart):.4f}; mean of the last {len(last)} losses"
                    f" {sum(last) / len(last):.4f}"
                )
            else:
                apart = distances(losses, own[name])
                say(f"{name:<19} {rung:<15} from {rungs[0]}: largest {max(apart):.1e}")


if __name__ == "__main__":
    main()
