"""Adafactor against transformers', its memory, and its states in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.optimization import Adafactor

from llmtune.checkpoint.stored_states import StoredParameter, StoredSlice
from llmtune.config.compose import compose_config
from llmtune.config.groups.optim import OptimConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.engine.optimizers.whole_optimizer import WholeOptimizer
from llmtune.errors import CheckpointError
from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer
from llmtune.optimizer.update import Update
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.param_groups import fit_optimizer
from llmtune.run.settings import find_problems

ADAFACTOR = OPTIMIZERS.find("adafactor")
#: Matrices, a stack of them, vectors, a scalar, and matrices of one row or column.
SHAPES = [(7, 5), (3,), (), (40, 3), (4, 3, 6), (1, 9), (9, 1)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_it_is_that_of_transformers(scale: float) -> None:
    """With the learning rate of the schedule; gradients may be missing now and then."""
    torch.manual_seed(0)
    own = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    known = [torch.nn.Parameter(weight.detach().clone()) for weight in own]
    groups: list[dict[str, Any]] = [{"params": own[:2]}, {"params": own[2:], "weight_decay": 0.0}]
    of_known = [{"params": known[:2]}, {"params": known[2:], "weight_decay": 0.0}]
    mine = WholeOptimizer(groups, ADAFACTOR, {"lr": 1e-2, "weight_decay": 0.1})
    theirs = Adafactor(
        of_known, lr=1e-2, weight_decay=0.1, relative_step=False, scale_parameter=False
    )
    for step in range(20):
        for index, (weight, other) in enumerate(zip(own, known, strict=True)):
            gradient = scale * torch.randn(weight.shape) if (step + index) % 4 else None
            weight.grad = gradient
            other.grad = None if gradient is None else gradient.clone()
        for optimizer in (mine, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for weight, other in zip(own, known, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)
        state = mine.state[weight]
        assert state.keys() - {"step"} == theirs.state[other].keys() - {"step", "RMS"}
        for name in state.keys() - {"step"}:
            torch.testing.assert_close(
                state[name], theirs.state[other][name], rtol=1e-6, atol=1e-6 * scale**2
            )


@pytest.mark.parametrize(
    "tuner", [TunerConfig(kind="full"), TunerConfig(kind="lora", use_dora=True, lora_r=3)]
)
def test_the_plan_counts_rows_columns_and_whole_vectors(tuner: TunerConfig) -> None:
    shape = resolve_shape(compose_config(["model=tiny"]).config.model, tuner)
    trained = [tensor for tensor in shape.tensors if tensor.trained]
    numbers = sum(
        tensor.numel if tensor.vector else sum(tensor.shape)  # The tiny model has no stacks.
        for tensor in trained
    )
    fitted = fit_optimizer(ADAFACTOR, shape)
    assert fitted.state_bytes * shape.trainable_parameters == pytest.approx(4 * numbers)
    assert fitted.update_bytes("cuda") == 4 * max(tensor.numel for tensor in trained)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero=3"], "optim=adafactor: Adafactor in ZeRO 3: ZeRO cuts matrices into flat pieces"),
        (["zero=1"], "take zero=0, or optim=adamw_8bit, which is cut anywhere"),
        (["offload=optimizer_cpu"], "optim=adafactor: Adafactor in ZeRO 1: ZeRO cuts matrices"),
        (["optim.betas=[0.8,0.9]"], "optim.betas=[0.8, 0.9]: Adafactor does not read it"),
        (["optim.eps=1e-6"], "optim.eps=1e-06: Adafactor does not read it"),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    problems = find_problems(compose_config(["optim=adafactor", *overrides]).config)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("overrides", [[], ["zero=0"], ["precision=fp16"], ["offload=none"]])
def test_what_it_can_do_is_not(overrides: list[str]) -> None:
    assert find_problems(compose_config(["optim=adafactor", *overrides]).config) == []


def test_states_of_other_shapes_need_stage_0() -> None:
    def nothing(_update: Update) -> None:
        """Change nothing."""

    shapes = ADAFACTOR.state_shapes
    with pytest.raises(ValueError, match="in the other stages parameters have no shape"):
        Optimizer(name="a", title="A", states=("b",), state_shapes=shapes, update=nothing)


def stored(file: Path, start: int, values: dict[str, Any]) -> StoredSlice:
    """A slice in a file of its own."""
    save_file({f"weight/{kind}": tensor for kind, tensor in values.items()}, file)
    return StoredSlice(file=file, name="weight", start=start, numel=2, storages={})


def test_a_state_that_is_not_cut_is_read_from_the_first_slice(tmp_path: Path) -> None:
    rows = torch.arange(3.0)
    first = stored(tmp_path / "0", 0, {"master": torch.zeros(2), "rows": rows})
    second = stored(tmp_path / "1", 2, {"master": torch.zeros(2)})
    assert torch.equal(StoredParameter(4, (first, second)).read_uncut("rows", 3), rows)
    with pytest.raises(CheckpointError, match=r"has the shape \(3,\), and not \(4,\)"):
        StoredParameter(4, (first, second)).read_uncut("rows", 4)
    with pytest.raises(CheckpointError, match="weight/rows is not there; a state file is missing"):
        StoredParameter(4, (second,)).read_uncut("rows", 3)
    with pytest.raises(CheckpointError, match="weight/columns"):
        StoredParameter(4, (first, second)).read_uncut("columns", 3)


def test_its_description_names_what_it_reads() -> None:
    settings = {"weight_decay": 0.1, "betas": [0.9, 0.999]}
    assert ADAFACTOR.describe(settings) == "Adafactor, weight decay 0.1"
    assert ADAFACTOR.settings(OptimConfig(), 0.1) == {"lr": 0.1, "weight_decay": 0.0}
