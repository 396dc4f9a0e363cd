"""Optimizers: their update rules against the formulas, and what plan and DeepSpeed are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import yaml

from llmtune.config.compose import compose_config
from llmtune.config.groups.optim import OptimConfig, Rounding
from llmtune.config.schema import Precision
from llmtune.config.stored import parse_yaml
from llmtune.engine.optimizers import elementwise_optimizer
from llmtune.engine.optimizers.elementwise_optimizer import ElementwiseOptimizer
from llmtune.errors import ConfigError
from llmtune.export.card.facts import Facts
from llmtune.export.card.tables import describe_settings
from llmtune.optimizer.adamw_rule import update_adamw
from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer, find_optimizer
from llmtune.optimizer.storage import BF16
from llmtune.optimizer.update import Update
from llmtune.plan.learning_rate import resolve_learning_rate
from llmtune.run.settings import find_problems
from llmtune.tuner.tuner import TUNERS
from tests.train import plain_loop

ADAMW, LION = OPTIMIZERS.find("adamw"), OPTIMIZERS.find("lion")
SETTINGS = {"lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.1}
SHAPES = [(7, 5), (3,), (1,), (40, 3), (2, 2)]


def make_groups(seed: int) -> list[dict[str, Any]]:
    """Matrices, and vectors without weight decay."""
    torch.manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return [
        {"params": [weight for weight in weights if weight.dim() > 1]},
        {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
    ]


def train(groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with drawn gradients; now and then a parameter has none."""
    weights = [weight for group in groups for weight in group["params"]]
    for step in range(steps):
        torch.manual_seed(step)
        for index, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight) if (step + index) % 4 else None
        optimizer.step()


@pytest.mark.parametrize("limit", [1, 5, 8, 10**6])
def test_lion_is_the_program_of_its_paper_however_parameters_are_cut(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise_optimizer, "ELEMENTS_ON_CPU", limit)
    groups, expected = make_groups(1), make_groups(1)
    own = ElementwiseOptimizer(groups, LION, SETTINGS)
    train(groups, own, 9)
    for group in expected:
        group.setdefault("weight_decay", SETTINGS["weight_decay"])
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    plain = PlainLion(expected, {"lr": SETTINGS["lr"], "betas": SETTINGS["betas"]})
    train(expected, plain, 9)
    for group, other in zip(groups, expected, strict=True):
        for weight, right in zip(group["params"], other["params"], strict=True):
            assert torch.allclose(weight, right, rtol=1e-6, atol=1e-7)
            momentum, known = own.state[weight]["exp_avg"], plain.state[right]["momentum"]
            assert torch.allclose(momentum, known, rtol=1e-5, atol=1e-7)
            assert own.state[weight]["step"] < 9


class PlainLion(plain_loop.Lion):
    """Leaves out what has no gradient."""

    def step(self, closure: Any = None) -> Any:
        groups = [list(group["params"]) for group in self.param_groups]
        for group, weights in zip(self.param_groups, groups, strict=True):
            group["params"] = [weight for weight in weights if weight.grad is not None]
        super().step()
        for group, weights in zip(self.param_groups, groups, strict=True):
            group["params"] = weights


def test_pieces_are_of_one_step_and_at_most_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise_optimizer, "ELEMENTS_ON_CPU", 6)
    seen: list[Update] = []
    rule = Optimizer(name="looks", title="Looks", states=("a", "b"), update=seen.append)
    groups = make_groups(2)
    optimizer = ElementwiseOptimizer(groups, rule, {"lr": 0.1})
    train(groups, optimizer, 5)
    assert {update.step for update in seen} == {1, 2, 3, 4, 5} - {5}
    for update in seen:
        numels = [tensor.numel() for tensor in update.parameters]
        assert 0 < sum(numels) <= 6
        assert set(update.states) == {"a", "b"}
        for tensors in (update.gradients, *update.states.values()):
            assert [tensor.numel() for tensor in tensors] == numels
    first = [update for update in seen if update.step == 1]
    parameters = [weight for group in groups for weight in group["params"]]
    assert sum(t.numel() for u in first for t in u.parameters) == sum(p.numel() for p in parameters)


def test_a_weight_that_is_no_block_of_memory_is_updated_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elementwise_optimizer, "ELEMENTS_ON_CPU", 4)
    weight = torch.nn.Parameter(torch.ones(5, 3).t())
    weight.grad = torch.ones(3, 5)
    ElementwiseOptimizer([{"params": [weight]}], LION, {**SETTINGS, "weight_decay": 0.0}).step()
    assert torch.allclose(weight, torch.full((3, 5), 0.99))


def test_deepspeed_builds_adamw_as_ever_and_is_told_about_the_others() -> None:
    optim = OptimConfig(betas=[0.8, 0.9], eps=1e-7, weight_decay=0.5)
    assert ADAMW.to_deepspeed(optim, 1e-3) == {
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-3,
                "betas": [0.8, 0.9],
                "eps": 1e-7,
                "weight_decay": 0.5,
                "torch_adam": True,
                "fused": True,
            },
        }
    }
    assert LION.to_deepspeed(optim, 1e-3) == {
        "optimizer": {
            "type": "Lion",
            "params": {"lr": 1e-3, "betas": [0.8, 0.9], "weight_decay": 0.5},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize(("optimizer", "numbers"), [(ADAMW, 3), (LION, 2)])
def test_memory_is_four_bytes_for_each_number(optimizer: Optimizer, numbers: int) -> None:
    assert optimizer.master_and_state_bytes == 4 * numbers
    assert optimizer.swap_buffers == numbers + 1


def test_the_group_of_keys_brings_the_betas_of_the_paper() -> None:
    lion = compose_config(["optim=lion"]).config.optim
    assert (lion.kind, lion.betas) == ("lion", [0.9, 0.99])
    assert LION.describe(asdict(lion)) == "Lion, betas [0.9, 0.99], weight decay 0.0"
    adamw = compose_config([]).config.optim
    assert (adamw.kind, adamw.betas) == ("adamw", [0.9, 0.999])
    assert ADAMW.describe(asdict(adamw)) == "AdamW, betas [0.9, 0.999], weight decay 0.0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.kind=lionn"], "optim.kind=lionn: there is no such one; did you mean lion?"),
        (["optim.kind=adam"], "optim.kind=adam: there is no such one; did you mean adamw?"),
        (["optim=lion", "optim.eps=1e-6"], "optim.eps=1e-06: Lion does not read it; leave it out"),
        (
            ["optim.rounding=kahan"],
            "optim.rounding=kahan: AdamW does not read it; leave it out",
        ),
        (
            ["optim=adamw_bf16", "precision=fp32"],
            "optim=adamw_bf16 with precision=fp32: its master weights are the model's own weights"
            " in bf16; take precision=bf16, or optim=adamw",
        ),
        (
            ["optim=adamw_8bit", "precision=fp16"],
            "optim=adamw_8bit with precision=fp16: its master weights are the model's own weights"
            " in bf16; take precision=bf16, or optim=adamw",
        ),
        (
            ["optim=adamw_8bit", "zero=0"],
            "optim=adamw_8bit: AdamW in 8 bits in ZeRO 0: DeepSpeed has bf16 master weights in ZeRO"
            " 1 to 3 only; take zero=auto",
        ),
        (
            ["optim=adamw_bf16", "tuner=full", "offload=nvme", "hardware.nvme_bytes=1TB"],
            "optim=adamw_bf16: AdamW in bf16 on NVMe: DeepSpeed swaps master weights, states and"
            " gradients through buffers of one dtype and length, and llmtune aligns them for fp32"
            " alone",
        ),
    ],
)
def test_an_unknown_optimizer_and_a_key_without_effect_are_refused(
    overrides: list[str], message: str
) -> None:
    assert message in find_problems(compose_config(overrides).config)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.eps=1e-6"],
        ["optim=lion"],
        ["optim=adamw_bf16", "optim.rounding=kahan", "offload=cpu"],
        ["optim=adamw_8bit", "optim.rounding=nearest", "zero=1"],
        ["optim=lion", "optim.weight_decay=0.1", "optim.betas=[0.95,0.98]"],
    ],
)
def test_what_an_optimizer_reads_may_be_set(overrides: list[str]) -> None:
    assert find_problems(compose_config(overrides).config) == []


def test_the_rate_that_is_taken_is_lower_for_lion_and_says_so() -> None:
    for kind, share in (("adamw", 1.0), ("lion", 0.2)):
        notes: list[str] = []
        optim = OptimConfig(kind=kind)
        rate = resolve_learning_rate(optim, TUNERS.find("lora"), 10**8, notes)
        assert rate == share * 1e-3
        assert ("for Lion" in notes[0]) == (kind == "lion")
        optim.learning_rate = 0.5
        assert resolve_learning_rate(optim, TUNERS.find("lora"), 10**8, notes) == 0.5


def test_a_configuration_stored_before_there_was_a_choice_is_of_adamw() -> None:
    stored: Any = yaml.safe_load(compose_config([]).yaml)
    del stored["optim"]["kind"]
    assert parse_yaml(yaml.safe_dump(stored)).optim == OptimConfig()
    facts = Facts(config={"tuner": {"kind": "full"}, "optim": stored["optim"]})
    assert ("optimizer", "AdamW, betas [0.9, 0.999], weight decay 0.0") in describe_settings(facts)
    unknown = Facts(config={"tuner": {"kind": "full"}, "optim": {"kind": "of_a_plugin"}})
    assert ("optimizer", "of_a_plugin") in describe_settings(unknown)


def nothing(_update: Update) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer(name="a", title="A", states=("master",), update=nothing), "neither"),
        (lambda: Optimizer(name="a", title="A", states=("step",), update=nothing), "neither"),
        (lambda: Optimizer(name="a", title="A", states=("b", "b"), update=nothing), "of its own"),
        (lambda: Optimizer(name="a", title="A", states=("b",)), "either update or built_with"),
        (
            lambda: Optimizer(name="a", title="A", states=(), master=BF16, update=nothing),
            "needs update and rounding",
        ),
        (
            lambda: Optimizer(name="a", title="A", states=(), reads=("nesterov",), update=nothing),
            "reads optim.nesterov, which is no key",
        ),
    ],
)
def test_an_incomplete_optimizer_is_refused(make: Callable[[], Optimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "rounding", "nbytes"),
    [
        ("adamw_bf16", "stochastic", 2 + 4),
        ("adamw_bf16", "kahan", 2 + 4 + 2),
        ("adamw_bf16", "nearest", 2 + 4),
        ("adamw_8bit", "stochastic", 2 + 2 * (1 + 4 / 256)),
        ("adamw_8bit", "kahan", 4 + 2 * (1 + 4 / 256)),
    ],
)
def test_low_precision_is_counted_and_described(kind: str, rounding: str, nbytes: float) -> None:
    optim = OptimConfig(kind=kind, rounding=Rounding(rounding))
    optimizer = find_optimizer(optim)
    assert optimizer.master_and_state_bytes == nbytes
    assert optimizer.describe(asdict(optim)).endswith(f"weight decay 0.0, rounding {rounding}")
    keys = optimizer.to_deepspeed(optim, 1e-3)
    assert keys["bf16"] == {"bf16_master_weights_and_grads": True}
    assert keys["optimizer"]["params"].keys() == {"lr", "betas", "eps", "weight_decay"}
    assert optimizer.update_bytes("cuda") > optimizer.update_bytes("cpu") > 0
    assert ADAMW.update_bytes("cuda") == LION.update_bytes("cuda") == 0


def test_storage_is_described() -> None:
    assert ADAMW.describe_storage() == "fp32 master weights and optimizer states"
    in_bf16 = find_optimizer(OptimConfig(kind="adamw_bf16"))
    assert in_bf16.describe_storage() == "bf16 master weights; optimizer states in bf16"
    in_8bit = find_optimizer(OptimConfig(kind="adamw_8bit"))
    assert in_8bit.describe_storage() == (
        "bf16 master weights; optimizer states in signed 8-bit blocks and unsigned 8-bit blocks"
    )
    paged = find_optimizer(OptimConfig(kind="adamw_paged_8bit"))
    assert paged.describe_storage() == (
        f"{in_8bit.describe_storage()}, which go to the host where a GPU is full"
    )


def test_the_rule_is_that_of_torch() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(100))
    known = torch.nn.Parameter(weight.detach().clone())
    states = {"exp_avg": [torch.zeros(100)], "exp_avg_sq": [torch.zeros(100)]}
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    plain = torch.optim.AdamW([known], **settings)
    for step in range(1, 8):
        gradient = torch.randn(100)
        known.grad = gradient
        plain.step()
        update_adamw(
            Update(
                parameters=[weight.detach()],
                gradients=[gradient],
                states=states,
                step=step,
                settings=settings,
            )
        )
    assert torch.allclose(weight, known, rtol=1e-6, atol=1e-7)


def test_one_without_states_is_complete() -> None:
    plain = Optimizer(name="sgd", title="SGD", states=(), reads=(), update=nothing)
    assert (plain.state_bytes, plain.master_and_state_bytes, plain.swap_buffers) == (0, 4, 2)
    assert plain.settings(OptimConfig(), 0.1) == {"lr": 0.1}
    assert plain.find_problems(OptimConfig(betas=[0.5, 0.5]), Precision.fp32)[0].startswith(
        "optim.betas="
    )


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="optim.kind=lion of .*: there is one of this name"):
        OPTIMIZERS.register(Optimizer(name="lion", title="L", states=(), update=nothing))
