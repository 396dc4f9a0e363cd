"""What trackers and the report cost a step: runs of the tiny model with and without them, in turn.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python scripts/bench/trackers.py [--runs 5] [--steps 60]

All local trackers at once: W&B offline, TensorBoard, MLflow, Trackio and Prometheus. Prints the
median time of a step of every run, and the differences of the medians of all runs of a kind.
Anything else that runs on the machine shows. With ``--direct`` no model is trained: the thread that
would train computes something that takes as long as a step, hands over a record, and the same
without trackers, block by block in one process. That can be told apart on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def step_of_processor_milliseconds(log: Any, first: int, steps: int) -> float:
    """Compute and log so many times; return the median processor time of this thread for it."""
    import torch

    matrix, times = torch.randn(256, 256), []
    for number in range(first, first + steps):
        began = time.thread_time()
        for _ in range(40):
            matrix @ matrix
        log({"step": number, "loss": 1.0, "grad_norm": 1.0, "seconds": 0.02, "tokens": 100})
        times.append(time.thread_time() - began)
    return 1000 * statistics.median(times)


def compare_directly(runs: int, steps: int, port: int) -> None:
    """Print the processor time of a step without trackers and with all of them, block by block."""
    from llmtune.config.groups.tracker import TrackerConfig, TrackerMode
    from llmtune.track.service import TrackedRun, open_services
    from llmtune.track.tracker import Outcome, Trackers

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRACKIO_DIR"] = folder
        config = TrackerConfig(
            kinds=["wandb", "tensorboard", "mlflow", "trackio", "prometheus"],
            mode=TrackerMode.offline,
            prometheus_port=port,
        )
        run = TrackedRun(
            config=config, folder=Path(folder, "run"), name="bench", settings={}, say=say
        )
        trackers = Trackers(open_services(run), say)
        found: dict[str, list[float]] = {"nothing": [], "trackers": []}
        for number in range(runs + 1):
            first = 1 + number * steps
            pair = {
                "nothing": step_of_processor_milliseconds(lambda _: None, 1, steps),
                "trackers": step_of_processor_milliseconds(trackers.log, first, steps),
            }
            # They are still opening in the first block.
            for kind in found if number else ():
                found[kind].append(pair[kind])
                say(f"block {number}  {kind:<9} {pair[kind]:8.3f} ms per step")
        trackers.finish(Outcome.finished)
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    say(f"trackers cost {medians['trackers'] - medians['nothing']:+.3f} ms per step")


def main() -> None:
    """Print a line per run, and the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--port", type=int, default=9464)
    parser.add_argument("--direct", action="store_true")
    given = parser.parse_args()
    if given.direct:
        compare_directly(given.runs, given.steps, given.port)
        return
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
