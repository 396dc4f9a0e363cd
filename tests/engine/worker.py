"""One rank that trains a list of small engines, one after the other, and writes what it saw."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed.utils.groups
import torch

from llmtune.checkpoint.save import PendingSave, SaveRequest, begin_save, load_checkpoint
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.checkpoint.writer import Buffers
from llmtune.config.cache_folder import open_cache
from llmtune.config.compose import compose_config
from llmtune.config.schema import Config, Precision
from llmtune.data.load.loader import TrainLoader
from llmtune.data.prepared_data import open_rows
from llmtune.engine.distributed import Rank, barrier, broadcast_object
from llmtune.engine.head_exchange import exchanging_heads
from llmtune.engine.optimizer_state import read_loss_scale, write_loss_scale
from llmtune.engine.train_module import TrainModule
from llmtune.engine.unreached import find_unreached
from llmtune.launch.preflight.deepspeed_ops import load_ops
from llmtune.model.task_folder import resolve_task_folder
from llmtune.model.token_folder import resolve_base_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.plan import resolve
from llmtune.plan.length.batch_schedule import ScheduledBatch
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.plan import Plan, with_nvme
from llmtune.plan.resolve import resolve_plan
from llmtune.run.task import adopt_task, prepare_rows, resolve_labels
from llmtune.storage.plain_fields import from_plain
from llmtune.task.losses import sum_cross_entropy
from llmtune.task.objective import ForwardPass
from llmtune.task.targets import Targets
from llmtune.train.builders.batches import build_collator
from llmtune.train.builders.job import build_module
from llmtune.train.model_files import render_model_files, resolve_weight_files
from llmtune.train.request import RunRequest
from tests.joined import join_ranks


def run_task(task: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """Train steps ``[first, last)`` and return losses, gradient norms and a digest of the
    weights.
    """
    config = adopt_task(compose_config(task["overrides"])).config
    with exchanging_heads(rank, config.launch.sequence_parallel_size):
        return run_steps(task, config, rank)


def run_steps(task: dict[str, Any], config: Config, rank: Rank) -> dict[str, Any]:
    """As :func:`run_task`."""
    if config.precision is Precision.fp16:
        pretend_fp16()
    cache = open_cache(config.paths)
    # One plan for all ranks, as the supervisor makes it.
    plan = from_plain(Plan, broadcast_object(resolve_plan(config, rank.world_size).to_dict(), rank))
    if plan.placement.uses_nvme:
        load_ops(plan.hardware.accelerator, plan.placement)
        # A folder a task: engines of one process would find each other's swap files.
        swap = tempfile.mkdtemp(dir=config.offload.nvme_path) if rank.is_first else None
        plan = with_nvme(plan, broadcast_object(swap, rank))
    base = resolve_on_first(config, rank)
    tokenizer = load_tokenizer(base, config.model)
    data = prepare_rows(config, tokenizer, cache)
    labels = resolve_labels(config, data, base)
    add_head = partial(resolve_task_folder, base, config.model, labels, tokenizer, config.seed)
    steps = resolve_steps(
        config.train, config.schedule, data.train.rows, plan.batch.global_batch_size
    )
    load = Path(task["load"]) if task.get("load") else None
    request = RunRequest(
        config=config,
        plan=plan,
        steps=steps,
        data=data,
        labels=labels,
        run_folder=Path(tempfile.gettempdir()),
        run_name="test",
        model_folder=on_first(partial(add_head, cache, print), rank),
        resume_from=load,
        run_id="",
    )
    if load is not None:
        # What is loaded must not be right by accident.
        torch.manual_seed(999)
    module = build_module(request, rank)
    if load is not None:
        assert load_checkpoint(module, load).step == task["first"]
    write_loss_scale(module, task.get("loss_scale", {}))
    for name, parameter in module.model.named_parameters():
        if task.get("without_gradient") and task["without_gradient"] in name:
            parameter.register_hook(torch.zeros_like)
    find_loss = module.objective.train
    collator = build_collator(request, rank, module.model, tokenizer)
    batch_plan = ScheduledBatch.from_config(config.train, plan.batch)
    loader = TrainLoader(open_rows(data, "train"), batch_plan, rank.rank, config.seed, collator)
    starts = list(itertools.islice(loader.step_starts(), task["last"]))
    seen, norms, applied = [], [], []
    pending: PendingSave | None = None
    for step in range(task["first"], task["last"]):
        if step == task.get("leave_out"):
            continue
        is_poisoned = step == task.get("poison")
        module.objective.train = not_a_number if is_poisoned else find_loss  # type: ignore[method-assign]
        torch.manual_seed(step)
        batch = loader.step_at(*starts[step])
        result = module.train_step(batch.micro_batches, batch.loss_weight, plan.learning_rate)
        assert result is not None
        seen.append(result.loss)
        norms.append(result.grad_norm)
        applied.append(result.applied)
        if task.get("save") and step + 1 == task["save_at"]:
            pending = save(module, task, config, tokenizer)
    if pending is not None:
        pending.finish()
    scale = read_loss_scale(module).get("cur_scale")
    unreached = find_unreached(module)
    module.engine.destroy()
    # hpZ's groups outlive their engine, and the next one would not make its own.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    return {
        "losses": seen,
        "norms": norms,
        "applied": applied,
        "loss_scale": scale,
        "unreached": unreached,
    }


def resolve_on_first(config: Config, rank: Rank) -> Path:
    """The model's folder, made by rank 0: transformers writes nothing on the others."""
    cache = open_cache(config.paths)
    return on_first(
        partial(resolve_base_folder, config.model, config.tuner.new_tokens, cache, print), rank
    )


def on_first(resolve: Callable[[], Path], rank: Rank) -> Path:
    """A folder that rank 0 makes, and the others find."""
    if rank.is_first:
        resolve()
    barrier(rank)
    return resolve()


def not_a_number(run: ForwardPass, targets: Targets) -> torch.Tensor:
    """A loss that is finite, with a gradient that is not, for one of the ranks."""
    logits = run().logits
    loss = sum_cross_entropy(logits, targets)
    if os.environ["RANK"] == "0":
        # The slope of the root is infinite at zero, and infinity times zero is no number.
        loss = loss + 0.0 * torch.sqrt(logits.float().sum() * 0.0)
    return loss


def ask_cpu_once() -> None:
    """DeepSpeedCPUAdam asks for the CPU's name each time it is made, through a process that takes a
    second.
    """
    import cpuinfo

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


def pretend_fp16() -> None:
    """Let DeepSpeed and the plan believe that this CPU has fp16: torch computes it anyway,
    slowly.
    """
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    patch.object(resolve, "fp16_supported", lambda _: True).start()


def save(module: TrainModule, task: dict[str, Any], config: Config, tokenizer: Any) -> PendingSave:
    """A checkpoint as a run writes it; in the background where the task says so, while training
    goes on.
    """
    weights = resolve_weight_files(config.tuner.kind, module.model, 10**9)
    folder, step = Path(task["save"]), task["save_at"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    model_files = {}
    if module.rank.is_first:
        # Of a run's small files, the configuration of the run itself is not wanted here.
        write_config = Path(tempfile.mkdtemp())
        (write_config / "config.yaml").write_text("")
        model_files = render_model_files(module.model, tokenizer, weights, write_config)
    state = TrainerState(
        step=step, tokens=0, skipped=0, data_fingerprint="test", data_position=None
    )
    return begin_save(
        module,
        SaveRequest(
            folder=folder,
            state=state,
            weights=weights,
            model_files=model_files,
            about={"step": step},
        ),
        Buffers(module.rank.device) if task.get("background") else None,
    )


if __name__ == "__main__":
    this = join_ranks()
    ask_cpu_once()
    results = [run_task(task, this) for task in json.loads(sys.argv[1])]
    if this.is_first:
        Path(sys.argv[2]).write_text(json.dumps(results))
    barrier(this)
    os._exit(0)
