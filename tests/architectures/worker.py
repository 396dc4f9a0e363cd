"""One rank that trains two steps of many tiny models, with llmtune and in plain PyTorch, and writes
both curves.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import transformers

from llmtune.config.compose import compose_config
from llmtune.config.schema import Config
from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.load.sequence_part import SequencePart
from llmtune.data.store.token_store import Row
from llmtune.engine.distributed import Rank, barrier, broadcast_object
from llmtune.engine.head_exchange import exchanging_heads
from llmtune.engine.train_module import TrainModule, zero_init
from llmtune.errors import LlmtuneError
from llmtune.model.build import WeightsTo, build_model, sees_padding
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.plan.abilities import check_row_length, check_stage, resolve_attention
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.deepspeed_config import to_deepspeed
from llmtune.plan.length.sequence_parallel import check_sequence_parallel
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.placement import make_placement
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.zero_buffers import resolve_zero_sizes
from llmtune.run.check_model import check_model, check_quantized
from llmtune.task.labels import Labels
from llmtune.task.objective import Objective
from llmtune.task.task import find_task
from llmtune.train.hooks.packing_probe import check_module
from llmtune.tuner.peft_model import add_lora
from llmtune.varlen_attention import VARLEN
from tests.architectures.families import FAMILIES
from tests.architectures.plain import load_plainly, train_plainly
from tests.engine.worker import ask_cpu_once
from tests.joined import join_ranks

#: Tokens of the documents of a step; some are longer than the windows of attention.
LENGTHS = (24, 9, 17, 14)
#: Of the longest row; two documents are packed into one.
MAX_SEQ_LENGTH = 48
STEPS, RATE, EPS = 2, 1e-2, 1e-6


def make_folder(family: str, rank: Rank) -> Path:
    """A folder with the random weights of a family, made by rank 0: transformers writes nothing on
    the others.
    """
    return Path(broadcast_object(str(_save(family)) if rank.is_first else None, rank))


@functools.cache
def _save(family: str) -> Path:
    """The weights are in fp32."""
    numbers = dict(FAMILIES[family])
    kind = str(numbers.pop("model_type", family))
    config = transformers.AutoConfig.for_model(
        kind, **numbers, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    for part in (config, getattr(config, "attn_config", None)):
        for name, value in vars(part).items() if part else ():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Larger than they are drawn, so that what a layer does to another document can be seen in
        # the losses.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        # What transformers draws for the padding token is nothing, at which the root of gemma3n's
        # sizes has no slope.
        embedding = model.get_input_embeddings().weight
        embedding[0] = embedding[1]
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=Path(sys.argv[2]).parent))
    model.save_pretrained(folder)
    return folder


def draw_steps() -> list[list[torch.Tensor]]:
    """Token numbers of the documents of each step."""
    draw = torch.Generator().manual_seed(5)
    return [
        [torch.randint(3, 128, (length,), generator=draw) for length in LENGTHS]
        for _ in range(STEPS)
    ]


def as_batch(documents: list[torch.Tensor], packed: bool, collator: Collator) -> Batch:
    """A micro-batch: two documents a row, or one."""
    size = 2 if packed else 1
    groups = [documents[start : start + size] for start in range(0, len(documents), size)]
    rows = []
    for group in groups:
        ids = torch.cat(group).numpy().astype(np.int32)
        mask = np.ones(len(ids), bool)
        # A document's first token is nobody's target.
        mask[np.cumsum([0, *(len(one) for one in group[:-1])])] = False
        rows.append(Row(ids=ids, mask=mask, documents=tuple(len(one) for one in group)))
    return collator.collate_rows(rows, packed)


def count_targets(documents: list[torch.Tensor]) -> int:
    """All tokens but the first of each document."""
    return sum(len(one) - 1 for one in documents)


def build(config: Config, shape: ModelShape, folder: Path, kernel: str, rank: Rank) -> TrainModule:
    """The engine, as a run builds it."""
    lora = config.tuner.kind == "lora"
    placement = make_placement(int(config.zero.stage), "none", config.tuner.kind == "full")
    batch = BatchPlan(
        global_batch_size=len(LENGTHS) * rank.world_size,
        micro_batch_size=len(LENGTHS),
        accumulation_steps=1,
        world_size=rank.world_size,
    )
    optimizer = find_optimizer(config.optim)
    sizes = resolve_zero_sizes(shape, placement, optimizer, rank.world_size, "cpu")
    plan = to_deepspeed(
        placement,
        batch,
        sizes,
        optimizer.to_deepspeed(config.optim, RATE),
        config.precision,
        config.train.max_grad_norm,
    )
    partitioned = (lambda: zero_init(plan)) if placement.zero_stage == 3 else None
    weights = WeightsTo(partitioned=partitioned, rank=rank.rank)
    model = build_model(folder, config.model, config.precision, kernel, weights)
    if lora:
        model = add_lora(model, config.tuner, "base", config.seed)
    objective = Objective.of_model(model, find_task("causal_lm"), Labels())
    return TrainModule(model, plan, rank, objective, optimizer)


def adapters_of(module: TrainModule) -> dict[str, torch.Tensor]:
    """Whole copies of the LoRA matrices, by their names in peft's model."""
    trained = {name: p for name, p in module.model.named_parameters() if ".lora_" in name}
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=module.zero_stage == 3):
        return {name: parameter.detach().clone() for name, parameter in trained.items()}


def run_cell(cell: list[Any], rank: Rank) -> dict[str, Any]:
    """Two steps of a cell, and of the same in plain PyTorch; or why it is refused.

    Args:
        cell: Family, ZeRO stage, tuner, and ``padded``, ``packed``, or ``unchecked``: packed, and
            tried on the ranks only. A fifth entry, ``shared``: all ranks share the tokens.
    """
    family, stage, tuner, rows, *how = cell
    folder, packed = make_folder(family, rank), rows != "padded"
    count = rank.world_size if how else 1
    overrides = [
        f"model.name_or_path={folder}",
        "data.train=none.jsonl",
        f"data.max_seq_length={MAX_SEQ_LENGTH}",
    ]
    overrides += [
        f"zero={stage}",
        f"tuner={tuner}",
        f"data.packing={packed}",
        f"launch.sequence_parallel_size={count}",
        "precision=fp32",
        f"optim.eps={EPS}",
    ]
    config = compose_config(
        [*overrides, "tuner.lora_r=4" if tuner == "lora" else "tuner=full"]
    ).config
    shape = resolve_shape(config.model, config.tuner)
    about = {
        "kernels": list(shape.kernels),
        "adapted": list(shape.adapted),
        "positions": shape.max_positions,
    }
    try:
        check_stage(int(stage), shape.kind, family)
        check_row_length(config.data.max_seq_length, shape.max_positions, family)
        kernel = resolve_attention(config, "cpu", shape.kernels)
        check_sequence_parallel(config, shape, kernel, rank.world_size)
        if rows != "unchecked":
            check_quantized(config, int(stage), folder)
            check_model(config, kernel, folder, None, lambda _: None)
        module = build(config, shape, folder, kernel, rank)
        flat = kernel == VARLEN
        collator = Collator(
            pad_token_id=0,
            masked=sees_padding(module.model),
            varlen=flat,
            flat=flat,
            part=SequencePart(rank.rank % count, count),
        )
        with exchanging_heads(rank, count):
            return {**about, **train(module, collator, config, shape, folder)}
    except LlmtuneError as error:
        return {**about, "refused": str(error), "code": error.exit_code}


def train(
    module: TrainModule, collator: Collator, config: Config, shape: ModelShape, folder: Path
) -> dict[str, Any]:
    """Two steps, and the same in plain PyTorch."""
    rank, packed = module.rank, config.data.packing
    if packed or collator.flat:
        check_module(module, collator, shape.vocab_size, torch.float32, shape.kind, packed)
    trained = {
        name for name, parameter in module.model.named_parameters() if parameter.requires_grad
    }
    planned = {tensor.name for tensor in shape.tensors if tensor.trained}
    adapters = adapters_of(module)
    losses, norms = [], []
    steps = draw_steps()
    for documents in steps:
        batch = as_batch(documents, packed, collator)
        # All groups of ranks have the same rows: their mean is that of one.
        groups = rank.world_size // collator.part.count
        result = module.train_step([batch], count_targets(documents) * groups, RATE)
        assert result is not None
        losses.append(result.loss)
        norms.append(result.grad_norm)
    held_out = module.evaluate([as_batch(steps[0], packed, collator)])
    assert held_out is not None
    losses.append(held_out.loss)
    module.engine.destroy()
    plain = load_plainly(folder, adapters, config.tuner.lora_r, int(config.tuner.lora_alpha))
    reference, plain_norms = train_plainly(plain, steps, RATE, EPS)
    unplanned = sorted(
        trained ^ {f"base_model.model.{name}" if adapters else name for name in planned}
    )
    return {
        "losses": losses,
        "plain": reference,
        "norms": norms,
        "plain_norms": plain_norms,
        "unplanned": unplanned,
    }


def main(cells: list[list[Any]], result: Path) -> None:
    """All cells, one after the other; written after each, so that a failing one can be told."""
    transformers.logging.set_verbosity_error()
    rank = join_ranks()
    ask_cpu_once()
    found: list[dict[str, Any]] = []
    for cell in cells:
        try:
            found.append(run_cell(cell, rank))
        except Exception as error:
            traceback.print_exc()
            found.append({"error": f"{type(error).__name__}: {error}"})
        if rank.is_first:
            result.write_text(json.dumps(found))
    barrier(rank)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)
