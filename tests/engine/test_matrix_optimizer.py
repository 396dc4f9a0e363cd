"""Muon's rule on whole matrices against torch's own, and what becomes of stacks and of padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtune.engine.optimizers.matrix_optimizer import MatrixOptimizer
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.optimizer.param_groups import IS_MATRICES

MUON = OPTIMIZERS.find("muon")
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "betas": [0.9, 0.99],
    "eps": 1e-8,
}
SHAPES = [(7, 5), (5, 9), (4, 4), (1, 6), (30, 2)]


class Model(torch.nn.Module):
    """Weights of given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(s)) for s in shapes)


def make(shapes: list[tuple[int, ...]]) -> tuple[Model, MatrixOptimizer]:
    """A model without ZeRO in fp32, whose weights are their own masters."""
    model = Model(shapes)
    groups: list[dict[str, Any]] = [{"params": list(model.weights), IS_MATRICES: True}]
    rank: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    own = MatrixOptimizer(groups, MUON, SETTINGS, rank)
    own.place(own, model, 0)
    return model, own


def test_matrices_take_the_steps_of_torch() -> None:
    model, own = make(list(SHAPES))
    reference = Model(list(SHAPES))
    plain = torch.optim.Muon(
        list(reference.weights),
        lr=SETTINGS["lr"],
        momentum=SETTINGS["momentum"],
        weight_decay=SETTINGS["weight_decay"],
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(6):
        for weight, other in zip(model.weights, reference.weights, strict=True):
            torch.manual_seed(step)
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        own.step()
        plain.step()
    for weight, other in zip(model.weights, reference.weights, strict=True):
        assert torch.allclose(weight, other, rtol=1e-5, atol=1e-6)
        assert set(own.state[weight]) == {"step", "momentum_buffer"}
        momentum = plain.state[other]["momentum_buffer"]
        assert torch.allclose(own.state[weight]["momentum_buffer"], momentum, rtol=1e-6)


def test_a_stack_of_experts_is_a_matrix_for_each() -> None:
    stacked, whole = make([(3, 6, 4)])
    single, parts = make([(6, 4)] * 3)
    with torch.no_grad():
        for index, weight in enumerate(single.weights):
            weight.copy_(stacked.weights[0][index])
    for step in range(3):
        torch.manual_seed(step)
        stacked.weights[0].grad = torch.randn(3, 6, 4)
        for index, weight in enumerate(single.weights):
            weight.grad = stacked.weights[0].grad[index].clone()
        whole.step()
        parts.step()
    for index, weight in enumerate(single.weights):
        assert torch.allclose(stacked.weights[0][index], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_a_direction_is_nearly_orthogonal_and_as_large_as_that_of_adamw(
    shape: tuple[int, int],
) -> None:
    assert MUON.matrix is not None
    torch.manual_seed(0)
    direction = MUON.matrix.direct(torch.randn(1, *shape))[0]
    values = torch.linalg.svdvals(direction / (0.2 * max(shape) ** 0.5))
    assert 0.3 < float(values.min()) <= float(values.max()) < 1.3
    assert 0.12 < float(direction.square().mean().sqrt()) < 0.25


def test_a_gradient_of_nothing_moves_nothing_but_the_decay() -> None:
    model, own = make([(4, 3)])
    before = model.weights[0].detach().clone()
    model.weights[0].grad = torch.zeros(4, 3)
    own.step()
    assert torch.allclose(model.weights[0], before * (1 - 1e-2 * 0.1))


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 24, 96), (1, 200, 8), (5, 16, 48)])
def test_the_operations_that_the_plan_counts_are_those_of_a_direction(
    shape: tuple[int, int, int],
) -> None:
    assert MUON.matrix is not None
    with FlopCounterMode(display=False) as counter:
        MUON.matrix.direct(torch.randn(shape))
    assert counter.get_total_flops() == shape[0] * MUON.matrix.flops(*shape[1:])
