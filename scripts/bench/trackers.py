"""What trackers and the report cost a step: runs of the tiny model with and without them, in turn.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python scripts/bench/trackers.py [--runs 5] [--steps 60]

All local trackers at once: W&B offline, TensorBoard, MLflow, Trackio and Prometheus. Prints the
median time of a step of every run, and the differences of the medians of all runs of a kind.
Anything else that runs on the machine shows.
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
    *("model=tiny", "data.train=stdlib_docs@400", "data.max_seq_length=256"),
    *("data.val_set_size=4", "launch.nproc=1", "export=none", "train.sample_answers=false"),
    *("train.save_strategy=no", "schedule=constant"),
]
KINDS = {
    "nothing": ["report.write=false"],
    "trackers": [
        "report.write=false",
        "tracker.kinds=[wandb,tensorboard,mlflow,trackio,prometheus]",
        "tracker.mode=offline",
    ],
    "report": ["report.write=true"],
}
#: Steps that are not counted: kernels and buffers are made in them.
WARM_UP = 10


def step_milliseconds(folder: Path, overrides: list[str], steps: int, port: int) -> float:
    """Train once; return the median time of a step, what is logged of it included."""
    command = [sys.executable, "-m", "llmtune", *JOB, *overrides, f"train.max_steps={steps}"]
    if any("prometheus" in text for text in overrides):
        command.append(f"tracker.prometheus_port={port}")
    env = {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}
    subprocess.run(
        [*command, f"output_dir={folder / 'run'}"], check=True, stdout=subprocess.DEVNULL, env=env
    )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return 1000 * statistics.median(float(record["seconds"]) for record in records[WARM_UP:])


def main() -> None:
    """Print a line per run, and the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--port", type=int, default=9464)
    given = parser.parse_args()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(given.runs):
        for kind, overrides in KINDS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[kind].append(
                    step_milliseconds(Path(folder), overrides, given.steps, given.port)
                )
            sys.stdout.write(f"run {number + 1}  {kind:<9} {found[kind][-1]:8.3f} ms per step\n")
            sys.stdout.flush()
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    for kind in ("trackers", "report"):
        sys.stdout.write(
            f"{kind:<9} {medians[kind]:8.3f} ms, nothing {medians['nothing']:8.3f} ms:"
            f" {medians[kind] - medians['nothing']:+.3f} ms\n"
        )


if __name__ == "__main__":
    main()
