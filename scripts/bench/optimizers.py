"""Train SmolLM2-135M fully on 2 ranks with each way to store AdamW's numbers, and compare the
losses with those of a training in fp32.

    DS_ACCELERATOR=cpu python scripts/bench/optimizers.py [STEPS]

That is six starts of 30 steps of two rows; prints the table of docs/planner.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

#: The first one is compared with: fp32 throughout. Where bf16 weights are rounded from fp32 master
#: weights, a weight stays as it is until its master is half a step of bf16 away.
OPTIMIZERS = {
    "adamw, precision=fp32": ["precision=fp32"],
    "adamw": [],
    "adamw_bf16": ["optim=adamw_bf16"],
    "adamw_bf16, nearest": ["optim=adamw_bf16", "optim.rounding=nearest"],
    "adamw_8bit": ["optim=adamw_8bit"],
    "adamw_bf16, kahan": ["optim=adamw_bf16", "optim.rounding=kahan"],
}
JOB = [
    "model=smollm2_135m",
    "tuner=full",
    "zero=3",
    "offload=none",
    "precision=bf16",
    "launch.nproc=2",
    "optim.learning_rate=1e-5",
    "data.train=stdlib_docs@400",
    "data.max_seq_length=128",
    "data.overlong=truncate",
    "data.val_set_size=0",
    "train.global_batch_size=2",
    "train.sample_answers=false",
    *("train.save_steps=null", "export=none"),
]


def run(overrides: list[str], folder: Path, steps: int) -> list[float]:
    """Train, and return the losses of the steps."""
    command = [sys.executable, "-m", "llmtune", "train", *JOB, *overrides]
    command += [f"train.max_steps={steps}", f"output_dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main(steps: int) -> None:
    """Print one row for each."""
    with tempfile.TemporaryDirectory() as folder:
        reference: list[float] = []
        for number, (name, overrides) in enumerate(OPTIMIZERS.items()):
            losses = run(overrides, Path(folder) / str(number), steps)
            reference = reference or losses
            apart = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
            sys.stdout.write(
                f"{name:<23} largest difference {max(apart):.4f}, mean"
                f" {sum(apart) / len(apart):.4f}, mean of the last ten losses"
                f" {sum(losses[-10:]) / len(losses[-10:]):.4f}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
