"""What a step of llmtune takes beside DeepSpeed's own calls, on one rank.

    DS_ACCELERATOR=cpu python scripts/bench/step_overhead.py [--steps 100] [--times 5]

One engine trains a tiny model. In turn, llmtune's loop does 100 steps as in a run (its loader, the
learning rate, the check of losses, a line in metrics.jsonl, the console, the stop request), and a
bare loop calls the engine's forward pass, ``backward`` and ``step`` on batches that are ready. Both
compute the same losses of the same rows. Prints the medians of the milliseconds of a step over all
turns, and their difference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmtune.config.cache_folder import open_cache
from llmtune.config.compose import compose_config
from llmtune.engine.distributed import Rank, init_ranks
from llmtune.launch.launchers.environment import set_defaults
from llmtune.launch.preflight.deepspeed_ops import load_ops
from llmtune.model.token_folder import resolve_base_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.memory.placement import Placement
from llmtune.plan.resolve import resolve_plan
from llmtune.run.task import adopt_task, prepare_rows, resolve_labels
from llmtune.track.console import Console
from llmtune.train import loop
from llmtune.train.build.job import build_job
from llmtune.train.request import RunRequest
from llmtune.train.stop_request import Stop


def make_job(folder: Path, steps: int, rank: Rank) -> loop.Job:
    """Build a run of the tiny model with everything that a run has."""
    overrides = ["model=tiny", "tuner=full", "zero=0", "precision=fp32", "optim=adamw"]
    overrides += ["data.train=stdlib_docs@400", "data.max_seq_length=128", "data.overlong=truncate"]
    overrides += ["data.val_set_size=8", f"train.max_steps={steps}", "train.sample_answers=false"]
    overrides += ["train.global_batch_size=4", "report.write=false", "export=none"]
    config = adopt_task(compose_config([*overrides, f"output_dir={folder}"])).config
    cache = open_cache(config.paths)
    plan = resolve_plan(config, 1)
    base = resolve_base_folder(config.model, config.tuner.new_tokens, cache, print)
    tokenizer = load_tokenizer(base, config.model)
    data = prepare_rows(config, tokenizer, cache)
    rows, batch = data.train.rows, plan.batch.global_batch_size
    request = RunRequest(
        config=config,
        plan=plan,
        steps=resolve_steps(config.train, config.schedule, rows, batch),
        data=data,
        labels=resolve_labels(config, data, base),
        run_folder=folder,
        run_name="overhead",
        model_folder=base,
        resume_from=None,
        run_id="",
    )
    return build_job(request, rank, Console(None), Stop(rank, folder))


def run_ours(job: loop.Job, steps: int) -> list[float]:
    """Seconds of each step of the loop, with what it does between two steps."""
    progress, seconds = replace(job.start, step=0), []
    batches = job.loader.from_position(None, steps, progress.reached)
    for _ in range(steps):
        started = time.perf_counter()
        progress = loop.train_step(job, progress, batches)
        job.ranks.after_step()
        job.stop.agree(job.saver.has_failed, job.saver.is_writing)
        seconds.append(time.perf_counter() - started)
    return seconds


def run_bare(job: loop.Job, steps: int) -> list[float]:
    """Seconds of each step of the engine's own calls, on the same rows."""
    batches = job.loader.from_position(None, steps, job.start.reached)
    ready = [next(batches) for _ in range(steps)]
    engine, objective, seconds = job.module.engine, job.module.objective, []
    engine.train()
    for step in ready:
        started = time.perf_counter()
        for index, batch in enumerate(step.micro_batches):
            engine.set_gradient_accumulation_boundary(index == len(step.micro_batches) - 1)
            inputs: dict[str, Any] = dict(batch.inputs)

            def forward(inputs: dict[str, Any] = inputs) -> Any:
                return engine(**inputs, use_cache=False)

            loss = objective.train(forward, batch.targets)
            engine.backward(loss / step.loss_weight, scale_wrt_gas=False)
            engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> int:
    """Measure, and print the difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    set_defaults("cpu", 1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # DeepSpeed asks for both, though there is no other rank to meet.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        folder.mkdir()
        load_ops("cpu", Placement(0))
        rank = init_ranks(meeting=Path(root) / "meeting")
        job = make_job(folder, 10**6, rank)
        runs: dict[str, list[float]] = {"llmtune": [], "bare": []}
        for _ in range(arguments.times + 1):
            for name, run in (("llmtune", run_ours), ("bare", run_bare)):
                runs[name].append(1000 * statistics.median(run(job, arguments.steps)))
        # The first turn warms up.
        ours, bare = (statistics.median(of_side[1:]) for of_side in runs.values())
    print(f"llmtune {ours:.2f} ms a step, bare DeepSpeed {bare:.2f} ms: {ours - bare:+.2f} ms")
    print(json.dumps({"llmtune_ms": ours, "bare_ms": bare, "turns": runs}))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
