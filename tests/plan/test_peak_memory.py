"""The memory and the files of adapters that begin with a part of the base, against live ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from llmtune.checkpoint.weight_files import WeightFiles
from llmtune.config.compose import compose_config
from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.schema import Config
from llmtune.engine.distributed import Rank
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.ladder import Candidate
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.peak_memory import checkpoint_bytes, start_bytes
from llmtune.plan.memory.rank_bytes import Arithmetic, element_bytes
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.tensor_shapes import AdapterSizes, count_start
from llmtune.plan.resolve import resolve_ladder
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.train.adapters.start import begin_from_base
from llmtune.tuner.peft_model import add_lora
from llmtune.tuner.start_factors import get_start, set_start, stored_parts
from tests.support import peak_bytes

ALONE = Rank(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def compose(*overrides: str) -> Config:
    return compose_config(["model=tiny", *overrides]).config


def shape_of(*overrides: str) -> ModelShape:
    config = compose(*overrides)
    return resolve_shape(config.model, config.tuner)


def one_layer(rows: int, columns: int, rank: int, start: str) -> ModelShape:
    """A shape with the start of one adapter."""
    sizes = AdapterSizes(rank=rank, inputs=columns, outputs=rows)
    tuner = TunerConfig(init_lora_weights=start)
    return replace(shape_of("tuner=full"), **count_start({"layer": sizes}, tuner))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)],
    ids=["bf16", "fp32"],
)
@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        (768, 768, 8),
        (2048, 640, 64),
        pytest.param(512, 2048, 128, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_begins_in_the_memory_that_is_planned(
    rows: int, columns: int, rank: int, start: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base: Any = nn.ModuleDict({"layer": nn.Linear(columns, rows, bias=False)}).to(dtype)
    model = get_peft_model(
        base, LoraConfig(r=rank, target_modules=["layer"]), autocast_adapter_dtype=False
    )
    taken = []
    for _ in range(3):
        before = peak_bytes(reset=True)
        begin_from_base(model, start, 0, ALONE)
        taken.append(peak_bytes(reset=False) - before)
    # Buffers of LAPACK and of the C library come with the first call, and stay; small blocks are no
    # mappings of their own. Products in bf16 take up to 5 MB more, by what the process has
    # multiplied before.
    planned = start_bytes(one_layer(rows, columns, rank, start), dtype.itemsize)
    assert 0.85 * planned < min(taken) < 1.05 * planned + 6_000_000


#: The tiny model's linear layers by their ends.
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@given(
    width=st.sampled_from([32, 64, 96]),
    rank=st.integers(1, 16),
    ranks=st.dictionaries(st.sampled_from(LAYERS), st.integers(1, 16), max_size=3),
    start=st.sampled_from(["pissa", "olora", "pissa_niter_2"]),
    more=st.sets(
        st.sampled_from(
            [
                *("tuner.use_dora=true", "tuner.trainable_token_indices=[3,5]"),
                *("tuner.modules_to_save=[model.norm]", "tuner.new_tokens=[a,b,c]"),
            ]
        )
    ),
    precision=st.sampled_from(["bf16", "fp32"]),
)
@settings(max_examples=12, deadline=None)
def test_first_values_and_the_stored_adapter_have_the_planned_bytes(
    width: int, rank: int, ranks: dict[str, int], start: str, more: set[str], precision: str
) -> None:
    patterns = ", ".join(f"{name}: {number}" for name, number in ranks.items())
    config = compose(
        *(f"model.config.hidden_size={width}", f"model.config.intermediate_size={2 * width}"),
        *(f"tuner.lora_r={rank}", f"tuner.rank_pattern={{{patterns}}}", *sorted(more)),
        *(f"tuner.init_lora_weights={start}", f"precision={precision}"),
    )
    shape = resolve_shape(config.model, config.tuner)
    size = element_bytes(config.precision)

    model = AutoModelForCausalLM.from_config(
        load_architecture(config.model), dtype=configured_dtype(precision)
    )
    if count := len(config.tuner.new_tokens):
        model.resize_token_embeddings(model.config.vocab_size + count, mean_resizing=False)
        first = model.config.vocab_size - count
        rows = [*(config.tuner.trainable_token_indices or ()), *range(first, first + count)]
        config.tuner.new_tokens, config.tuner.trainable_token_indices = [], rows
    adapted = add_lora(model, config.tuner, "base", 0)
    set_start(adapted, begin_from_base(adapted, start, 0, ALONE))
    parts = [part for one in get_start(adapted).values() for part in (one.a, one.b)]
    # A view would keep more than its own bytes.
    assert sum(part.untyped_storage().nbytes() for part in parts) == size * shape.start_parameters
    assert shape.start_parameters > 0

    files = WeightFiles(adapter_only=True, joined=stored_parts(adapted))
    stored = sum(
        files.to_stored(name, parameter).nbytes
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    )
    optimizer = OPTIMIZERS.find("adamw")
    states = int(optimizer.master_and_state_bytes) * shape.trainable_parameters
    assert checkpoint_bytes(shape, Arithmetic(config.precision, optimizer)) == stored + states


def test_an_adapter_with_another_start_needs_nothing_of_it() -> None:
    shape = shape_of("tuner=lora")
    assert start_bytes(shape, 2) == 0
    pissa = shape_of("tuner=pissa")
    matrices = [one for one in pissa.tensors if ".lora_" in one.name]
    assert pissa.start_parameters == sum(one.numel for one in matrices) == shape.adapter_parameters


SIZES = [
    *("model.config.hidden_size=2048", "model.config.intermediate_size=8192"),
    "model.config.num_hidden_layers=8",
]


def candidates(*overrides: str) -> dict[str, Candidate]:
    """Of a model that is mostly matrices of 2,048 x 8,192, with short rows."""
    config = compose(
        *SIZES,
        *("hardware=8xa100_80gb", "data.train=a.jsonl", "data.max_seq_length=128"),
        *("train.per_device_train_batch_size=1", "train.gradient_checkpointing=true", *overrides),
    )
    ladder = resolve_ladder(config, planning=True)
    return {one.name: one.candidate for one in ladder.rungs if one.candidate is not None}


@pytest.mark.parametrize("zero", [1, 3])
def test_the_peak_is_that_of_the_start_where_a_step_takes_less(zero: int) -> None:
    """An SVD takes more than a step under ZeRO 3.

    Under ZeRO 1 the model is on the host then, and has all of the GPU's memory in a step.
    """
    stage = f"zero.stage={zero}"
    plain, pissa = candidates("tuner=lora", stage), candidates("tuner=pissa", stage)
    matrix, side = 2048 * 8192, 2048
    full = "tuner.init_lora_weights=pissa"
    svd = candidates("tuner=pissa", full, stage)["none"].memory.device
    step = plain["none"].memory.device
    needed = (2 + 4) * matrix + 4 * (2 * matrix + 5 * side * side)
    if zero == 3:
        needed += svd.weights + svd.adapters
    assert svd.total == max(needed + svd.runtime, step.total)
    assert (svd.start > 0) == (svd.total > step.total) == (zero == 3)
    for rung, candidate in pissa.items():
        host, shape = candidate.memory.host, shape_of(*SIZES, "tuner=lora")
        assert host.start == 2 * shape.adapter_parameters, rung
        assert candidate.memory.checkpoint - plain[rung].memory.checkpoint == host.start, rung
