"""One rank that builds small engines, trains two steps, and writes the bytes that DeepSpeed really
holds.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtune.config.compose import compose_config
from llmtune.engine.distributed import Rank, barrier, broadcast_object, gather_objects, gather_rows
from llmtune.engine.partitions import gather, gather_for_readers
from llmtune.engine.train_module import TrainModule, zero_init
from llmtune.launch.preflight.deepspeed_ops import load_ops
from llmtune.model.build import WeightsTo, build_model
from llmtune.model.nf4.nf4_linear import Nf4Linear
from llmtune.model.nf4.nf4_model import In4Bits
from llmtune.model.token_folder import find_token_ids
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.deepspeed_config import to_deepspeed, with_nvme_path
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.parameter_groups import assign_groups
from llmtune.plan.memory.placement import make_placement
from llmtune.plan.memory.rank_bytes import Arithmetic, StateBytes
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.zero_buffers import resolve_zero_sizes
from llmtune.plan.memory.zero_states import state_bytes
from llmtune.plan.param_groups import fit_optimizer, groups_of_model, groups_of_shape
from llmtune.task.labels import Labels
from llmtune.task.objective import Objective
from llmtune.task.task import find_task
from llmtune.tuner.token_rows.tables import with_new_tokens
from llmtune.tuner.tuner import TUNERS
from tests.engine.rows import random_rows
from tests.engine.worker import ask_cpu_once, resolve_on_first
from tests.joined import join_ranks

#: Storages below this are counters, scalars and DeepSpeed's placeholders.
SMALL_BYTES = 300


def storages() -> dict[int, int]:
    """Address -> bytes of every tensor that is alive in this process."""
    gc.collect()
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            if storage.nbytes() > SMALL_BYTES:
                found[storage.data_ptr()] = storage.nbytes()
    return found


def run_task(task: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """Predicted and measured bytes of this rank: what stands right before an optimizer step, and on
    disk.
    """
    config = compose_config(task["overrides"]).config
    folder = broadcast_object(
        tempfile.mkdtemp(dir=Path(sys.argv[2]).parent) if rank.is_first else None, rank
    )
    shape = resolve_shape(config.model, config.tuner)
    tuner = TUNERS.find(config.tuner.kind)
    placement = make_placement(task["stage"], task["rung"], tuner.trains_all)
    shape = assign_groups(shape, groups_of_shape(config.optim, config.tuner, shape))
    optimizer = fit_optimizer(find_optimizer(config.optim), shape)
    sizes = resolve_zero_sizes(shape, placement, optimizer, rank.world_size, "cpu")
    batch = BatchPlan(
        global_batch_size=task["accumulation"] * rank.world_size,
        micro_batch_size=1,
        accumulation_steps=task["accumulation"],
        world_size=rank.world_size,
    )
    arithmetic = Arithmetic(config.precision, optimizer)
    predicted = state_bytes(
        shape, placement, sizes, arithmetic, rank.world_size, batch.accumulation_steps
    )
    keys = optimizer.to_deepspeed(config.optim, 1e-3)
    deepspeed = with_nvme_path(
        to_deepspeed(placement, batch, sizes, keys, config.precision, 1.0), folder
    )
    model_folder = resolve_on_first(config, rank)

    load_ops("cpu", placement)
    before = storages()
    partitioned = (lambda: zero_init(deepspeed)) if placement.zero_stage == 3 else None
    in_4_bits = None
    if tuner.is_quantized:
        double_quant = config.tuner.bnb_4bit_use_double_quant
        in_4_bits = In4Bits(double_quant, rank.device, partial(gather_rows, rank=rank))
    weights = WeightsTo(partitioned=partitioned, rank=rank.rank, in_4_bits=in_4_bits)
    model = build_model(model_folder, config.model, config.precision, "eager", weights)
    numbers = find_token_ids(model_folder, config.tuner.new_tokens)
    tuner_config = with_new_tokens(model, config.tuner, numbers)
    model = tuner.attach(model, tuner_config, "base", 0, gather=gather)
    group_of = groups_of_model(config.optim, config.tuner, model, ())
    objective = Objective.of_model(model, find_task("causal_lm"), Labels())
    module = TrainModule(model, deepspeed, rank, objective, optimizer, group_of=group_of)
    gather_for_readers(tuner.find_read_elsewhere(model))
    del model
    trained = sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in module.engine.module.parameters()
        if parameter.requires_grad
    )
    memory = measure_steps(module, before, batch, shape.vocab_size)
    in_nf4 = gather_objects(count_nf4(module), rank)
    barrier(rank)
    swapped = sum(
        file.stat().st_size for file in Path(folder).rglob(f"rank{rank.rank}/*") if file.is_file()
    )
    module.engine.destroy()
    del module
    total = predicted.total
    planned_nf4 = plan_nf4(
        shape,
        partial(
            state_bytes,
            placement=placement,
            sizes=sizes,
            arithmetic=arithmetic,
            world_size=rank.world_size,
        ),
    )
    categories = {
        n: str(getattr(predicted, n))
        for n in ("weights", "adapters", "gradients", "optimizer", "buckets")
    }
    return {
        "predicted": {
            "memory": total.device + total.host,
            "nvme": total.nvme,
            "trained": shape.trainable_parameters,
            "nf4": planned_nf4,
        },
        "measured": {
            "memory": memory,
            "nvme": swapped,
            "trained": trained,
            # Of the rank that has most or least.
            "nf4": max(in_nf4, key=lambda nbytes: abs(nbytes - planned_nf4)),
        },
        "categories": categories,
    }


def count_nf4(module: TrainModule) -> int:
    """Bytes of this rank's numbers and scales of the weights in 4 bits, wherever they are."""
    layers = [one for one in module.model.modules() if isinstance(one, Nf4Linear)]
    # Under ZeRO 3 the parameter itself is empty between two passes.
    return sum(getattr(one.weight, "ds_tensor", one.weight).nbytes for one in layers)


def plan_nf4(shape: ModelShape, plan: Callable[[ModelShape], StateBytes]) -> int:
    """Bytes of the weights in 4 bits: what the plan of the model without them lacks."""
    others = tuple(tensor for tensor in shape.tensors if not tensor.is_quantized)
    rest = replace(shape, tensors=others, parameters=shape.parameters - shape.quantized_parameters)
    weights, without = plan(shape).weights, plan(rest).weights
    return weights.device + weights.host - without.device - without.host


def measure_steps(module: TrainModule, before: dict[int, int], batch: BatchPlan, vocab: int) -> int:
    """Train two steps and look right before the second optimizer step, where gradients and states
    all stand.
    """
    seen = [0]
    step = module.engine.step

    def looking(*args: Any, **kwargs: Any) -> None:
        looks = []
        for _ in range(3):
            looks.append(sum(size for address, size in storages().items() if address not in before))
            # A thread that has read weights may be about to let go of them.
            time.sleep(0.1)
        seen[0] = min(looks)
        step(*args, **kwargs)

    for number in range(2):
        rows = [
            random_rows(1, 16, vocab, 10 * number + micro)
            for micro in range(batch.accumulation_steps)
        ]
        module.engine.step = looking if number == 1 else step
        module.train_step(rows, 16 * batch.global_batch_size, 1e-3)
    module.engine.step = step
    return seen[0]


if __name__ == "__main__":
    this = join_ranks()
    ask_cpu_once()
    # What the libraries made on import is not looked through again and again. Nothing else may
    # freeze after this: what a process imports late (``llmtune.process.no_collection``) would take
    # the tensors that are there out of the count.
    gc.freeze()
    gc.freeze = lambda: None
    results = []
    for one in json.loads(sys.argv[1]):
        results.append(run_task(one, this))
        if this.is_first:
            # Line by line, so that a failing task can be told.
            Path(sys.argv[2]).write_text(json.dumps(results))
    barrier(this)
    os._exit(0)
