"""What trackers and the report cost a step: runs of the tiny model with and without them, in turn.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python scripts/bench/trackers.py [--runs 5] [--steps 60]

All local trackers at once: W&B offline, TensorBoard, MLflow, Trackio and Prometheus. Prints the
median time of a step of every run, and the differences of the medians of all runs of a kind.
Anything else that runs on the machine shows. With ``--direct`` no model is trained: the thread that
would train computes something for 20 ms, hands over a record, and the same without trackers, block
by block in one process. That can be told apart on a busy machine too: by the thread's processor
time, and by the time on the clock, which has what trackers' threads take from it.
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
#: Small operators of a step with ``--direct``, between which Python runs, as in a small model.
DIRECT_PRODUCTS = 40
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


def direct_milliseconds(log: Any, first: int, steps: int) -> tuple[float, float]:
    """Compute and log so many times.

    Returns:
        Medians of this thread's processor time, and of the time on the clock.
    """
    import torch

    matrix = torch.randn(256, 256)
    processor, clock = [], []
    for number in range(first, first + steps):
        began, began_on_clock = time.thread_time(), time.perf_counter()
        for _ in range(DIRECT_PRODUCTS):
            matrix @ matrix
        log({"step": number, "loss": 1.0, "grad_norm": 1.0, "seconds": 0.02, "tokens": 100})
        processor.append(time.thread_time() - began)
        clock.append(time.perf_counter() - began_on_clock)
    return 1000 * statistics.median(processor), 1000 * statistics.median(clock)


def compare_directly(runs: int, steps: int, port: int) -> None:
    """Print what a step takes without trackers and with all of them, block by block."""
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
        found: list[tuple[float, float]] = []
        for number in range(runs + 1):
            first = 1 + number * steps
            without = direct_milliseconds(lambda _: None, 1, steps)
            tracked = direct_milliseconds(trackers.log, first, steps)
            # They are still opening in the first block.
            if number == 0:
                continue
            found.append((tracked[0] - without[0], tracked[1] - without[1]))
            say(
                f"block {number}: processor {without[0]:.3f} and {tracked[0]:.3f} ms, clock"
                f" {without[1]:.3f} and {tracked[1]:.3f} ms per step"
            )
        trackers.finish(Outcome.finished)
    processor, clock = (statistics.median(column) for column in zip(*found, strict=True))
    say(f"trackers cost {processor:+.3f} ms of the processor, {clock:+.3f} ms per step")


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
    if given.runs < 1 or given.steps <= WARM_UP:
        parser.error(f"--runs is at least 1, and --steps above {WARM_UP}")
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
