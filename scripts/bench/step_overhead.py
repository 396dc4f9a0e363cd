"""What a step of llmtune takes beside DeepSpeed's own calls, on one rank.

    DS_ACCELERATOR=cpu python scripts/bench/step_overhead.py [--steps 100] [--times 5]

One engine trains a tiny model. llmtune's loop does a step as in a run (its loader, the learning
rate, the check of losses, a line in metrics.jsonl, the console, the stop request), and then a bare
loop calls the engine's forward pass, ``backward`` and ``step`` on the same rows, which are ready;
and so on. Prints the median over ``--times`` turns of the medians of ``--steps`` steps, and the
difference of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

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
from llmtune.storage import layout
from llmtune.track.console import Console
from llmtune.train import loop
from llmtune.train.builders.job import build_job
from llmtune.train.request import RunRequest
from llmtune.train.stop_request import Stop

#: Steps that do not count.
WARM_UP = 20


def make_job(folder: Path, steps: int, rank: Rank) -> loop.Job:
    """Build a run of the tiny model with everything that a run has."""
    overrides = ["model=tiny", "tuner=full", "zero=0", "precision=fp32", "optim=adamw"]
    overrides += ["data.train=stdlib_docs@400", "data.max_seq_length=512", "data.overlong=truncate"]
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


def ours(job: loop.Job, steps: int) -> Iterator[float]:
    """Do steps of llmtune's loop; yield the seconds of each, with what is done between two."""
    progress = job.start
    batches = job.loader.from_position(None, steps, progress.reached)
    for _ in range(steps):
        started = time.perf_counter()
        progress = loop.train_step(job, progress, batches)
        job.ranks.after_step()
        job.stop.agree(job.saver.has_failed, job.saver.is_writing)
        yield time.perf_counter() - started


def bare(job: loop.Job, steps: int) -> Iterator[float]:
    """Do steps of the engine's own calls on the same rows, which are ready; yield their seconds."""
    batches = job.loader.from_position(None, steps, job.start.reached)
    engine, objective = job.module.engine, job.module.objective
    for _ in range(steps):
        step = next(batches)
        engine.train()
        started = time.perf_counter()
        for index, batch in enumerate(step.micro_batches):
            engine.set_gradient_accumulation_boundary(index == len(step.micro_batches) - 1)
            forward = partial(engine, **batch.inputs, use_cache=False)
            loss = objective.train(forward, batch.targets)
            engine.backward(loss / step.loss_weight, scale_wrt_gas=False)
            engine.step()
        yield time.perf_counter() - started


def main() -> int:
    """Measure, and print the difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    steps = arguments.steps * arguments.times + WARM_UP
    set_defaults("cpu", 1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # DeepSpeed asks for both, though there is no other rank to meet.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        folder.mkdir()
        # A run has written its own; a checkpoint would take it along.
        (folder / layout.CONFIG).write_text("")
        load_ops("cpu", Placement(0))
        rank = init_ranks(meeting=Path(root) / "meeting")
        job = make_job(folder, 10**6, rank)
        # The first steps of both warm up.
        pairs = list(zip(ours(job, steps), bare(job, steps), strict=True))[WARM_UP:]
    turns = [
        pairs[start : start + arguments.steps] for start in range(0, len(pairs), arguments.steps)
    ]
    medians = [
        [1000 * statistics.median(side) for side in zip(*turn, strict=True)] for turn in turns
    ]
    llmtune, engine = (statistics.median(side) for side in zip(*medians, strict=True))
    print(f"llmtune {llmtune:.2f} ms a step, DeepSpeed {engine:.2f} ms: {llmtune - engine:+.2f} ms")
    print(json.dumps({"llmtune_ms": llmtune, "deepspeed_ms": engine, "turns": medians}))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
