"""How long training stands still for a checkpoint: written in the background against written at
once, in the same job.

    python scripts/bench/checkpoints.py [--zero 2] [--saves 4] [--folder /path/on/the/disk]

SmolLM2-135M fully on 2 ranks (checkpoints of 1.9 GB), and the size of a LoRA r=16 checkpoint of it.
Run it alone on the machine: the writing thread and the training share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = [
    "data.train=stdlib_docs@200",
    "data.val_set_size=4",
    "data.max_seq_length=256",
    "data.overlong=truncate",
    *("train.global_batch_size=4", "train.sample_answers=false", "launch.nproc=2", "export=none"),
]


def train(folder: Path, *overrides: str) -> None:
    """One run, its output in ``<folder>.log``."""
    command = [sys.executable, "-m", "llmtune", *JOB, *overrides, f"output_dir={folder}"]
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=log, env={**os.environ, "DS_ACCELERATOR": "cpu"}
        )


def pauses(folder: Path) -> list[float]:
    """Seconds that training stood still for each save, from ``metrics.jsonl``."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["save_pause_seconds"] for record in records if "save_pause_seconds" in record]


def step_seconds(folder: Path) -> float:
    """Median length of a step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(float(record["seconds"]) for record in records if "seconds" in record)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zero", default="2", help="ZeRO stage")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="where the runs are written; a temporary folder without",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        every = 4
        steps = [
            f"train.max_steps={every * arguments.saves + 1}",
            f"train.save_steps={every}",
            f"zero={arguments.zero}",
        ]
        found = {}
        for background in ("false", "true"):
            folder = root / background
            train(
                folder,
                "tuner=full",
                "optim.learning_rate=1e-5",
                *steps,
                f"checkpoint.background={background}",
            )
            found[background] = pauses(folder)
            shown = ", ".join(f"{seconds:.2f}" for seconds in found[background])
            print(
                f"background={background:<5}  pauses {shown} s; median step"
                f" {step_seconds(folder):.2f} s"
            )
        at_once, behind = (statistics.median(found[key]) for key in ("false", "true"))
        worst = max(found["true"]) / at_once
        print(
            f"pause with background writing: {behind / at_once:.1%} of the synchronous save (worst"
            f" {worst:.1%})"
        )
        train(root / "lora", "tuner=lora", "train.max_steps=2")
        size = sum(file.stat().st_size for file in (root / "lora" / "checkpoint-2").iterdir())
        print(f"LoRA r=16 checkpoint: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
