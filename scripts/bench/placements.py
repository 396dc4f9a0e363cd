"""Train SmolLM2-135M fully on 2 ranks for 10 steps on every rung of the ladder, and compare the
losses.

    DS_ACCELERATOR=cpu python scripts/bench/placements.py NVME_FOLDER

Takes about 6 minutes on 2 cores; prints the table of docs/planner.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNGS = ("none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme")
JOB = [
    "model=smollm2_135m",
    "tuner=full",
    "zero=3",
    "launch.nproc=2",
    "data.train=stdlib_docs@200",
    "data.max_seq_length=192",
    "train.global_batch_size=2",
    "train.max_steps=10",
    "train.eval_max_rows=2",
    "train.sample_answers=false",
    *("train.save_steps=null", "export=none"),
]


def run(rung: str, folder: Path, nvme: str) -> tuple[list[float], float]:
    """Losses of the ten steps, and the seconds of the steps."""
    out = folder / rung
    command = [
        sys.executable,
        "-m",
        "llmtune",
        *JOB,
        f"offload={rung}",
        f"offload.nvme_path={nvme}",
        f"output_dir={out}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return [line["loss"] for line in steps], sum(line["seconds"] for line in steps)


def main(nvme: str) -> None:
    """Print one row a rung."""
    with tempfile.TemporaryDirectory() as folder:
        reference: list[float] = []
        for rung in RUNGS:
            started = time.monotonic()
            losses, seconds = run(rung, Path(folder), nvme)
            reference = reference or losses
            apart = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
            shown = " ".join(f"{loss:.6f}" for loss in losses)
            whole = time.monotonic() - started
            sys.stdout.write(
                f"{rung:<15} apart {apart:.1e}  {seconds:6.1f} s of {whole:6.1f} s  {shown}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
