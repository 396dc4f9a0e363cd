"""A model's loss in its output projection is that of its logits, for every architecture."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from llmtune.plan.architecture.meta_model import build_meta_model
from llmtune.task.labels import Labels
from llmtune.task.language_head.head_loss import find_head_loss, plain_head
from llmtune.task.language_head.logit_map import LogitMap, find_logit_map
from llmtune.task.objective import Objective
from llmtune.task.targets import Targets
from llmtune.task.task import find_task
from tests.architectures.families import FAMILIES

TASK = find_task("causal_lm")
#: RWKV compiles a kernel of its own.
NAMES = sorted(set(FAMILIES) - {"rwkv"})


def build(name: str, **more: Any) -> Any:
    numbers = {**FAMILIES[name], "pad_token_id": 0, **more}
    kind = numbers.pop("model_type", name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **numbers), dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def targets_of(ids: torch.Tensor) -> Targets:
    """Every third word of two rows, and none of a third row."""
    positions = torch.arange(0, 2 * ids.shape[1] - 1, 3)
    return Targets(
        positions=positions,
        values=ids.flatten()[positions + 1],
        weight=len(positions),
        row_length=ids.shape[1],
    )


def losses_of(model: Any, objective: Objective, ids: torch.Tensor) -> dict[str, Any]:
    """Loss and gradients of training, and loss and counts of an evaluation."""
    model.zero_grad()
    run = partial(model, input_ids=ids, use_cache=False)
    loss = objective.train(run, targets_of(ids))
    loss.backward()
    gradients = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }
    with torch.no_grad():
        judged, observed = objective.judge(run, targets_of(ids))
    return {"loss": loss.detach(), "judged": judged, "observed": observed, "gradients": gradients}


def compare(model: Any, smoothing: float = 0.0) -> None:
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    plain = losses_of(model, Objective(TASK, Labels(), smoothing), ids)
    objective = Objective.of_model(model, TASK, Labels(), smoothing)
    assert objective.head is not None
    objective.install()
    found = losses_of(model, objective, ids)
    torch.testing.assert_close(found, plain, rtol=2e-5, atol=1e-5)
    # Asked for nothing, the model has its logits.
    assert model(input_ids=ids, use_cache=False).logits.shape[-1] > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_the_logits(name: str) -> None:
    compare(build(name))


def test_smoothed_targets_are_those_of_the_logits() -> None:
    compare(build("llama"), smoothing=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_knows_it_without_weights(name: str) -> None:
    numbers = {**FAMILIES[name], "pad_token_id": 0}
    architecture = AutoConfig.for_model(numbers.pop("model_type", name), **numbers)
    meta, _ = build_meta_model(architecture)
    assert find_logit_map(meta) == find_logit_map(build(name))


def test_a_factor_and_a_cap_are_found() -> None:
    assert find_logit_map(build("llama")) == LogitMap()
    assert find_logit_map(build("gemma2")) == LogitMap(cap=30.0)
    assert find_logit_map(build("cohere")) == LogitMap(factor=0.0625)
    assert find_logit_map(build("granite", logits_scaling=8.0)) == LogitMap(factor=0.125)


def square(model: Any, hidden: torch.Tensor) -> Any:
    return model.lm_head(hidden) ** 2


def shift(model: Any, hidden: torch.Tensor) -> Any:
    return model.lm_head(hidden).roll(1, dims=1)


def scale_by_position(model: Any, hidden: torch.Tensor) -> Any:
    return model.lm_head(hidden) * torch.arange(1, hidden.shape[1] + 1)[None, :, None]


def cool(model: Any, hidden: torch.Tensor) -> Any:
    return model.lm_head(hidden) / (1.0 + hidden.norm(dim=-1, keepdim=True))


def put_tokens_first(model: Any, hidden: torch.Tensor) -> Any:
    return model.lm_head(hidden.transpose(0, 1)).transpose(0, 1)


def name_the_input(model: Any, hidden: torch.Tensor) -> Any:
    return model.lm_head(input=hidden)


def call_twice(model: Any, hidden: torch.Tensor) -> Any:
    model.lm_head(hidden)
    return model.lm_head(hidden)


def go_in_pieces(model: Any, hidden: torch.Tensor) -> Any:
    return torch.cat([model.lm_head(piece) for piece in hidden.split(2, dim=1)], dim=1)


OWN_WAYS = [
    *(square, shift, scale_by_position, cool, put_tokens_first),
    *(name_the_input, call_twice, go_in_pieces),
]


@pytest.mark.parametrize("way", OWN_WAYS)
def test_what_is_not_known_is_left_to_the_logits(way: Any) -> None:
    class Own(type(build("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **named: Any) -> Any:
            hidden = self.model(input_ids=input_ids, **named).last_hidden_state
            return CausalLMOutput(logits=way(self, hidden))

    model = build("llama")
    model.__class__ = Own
    assert find_logit_map(model) is None
    assert Objective.of_model(model, TASK, Labels()).head is None


def test_logits_that_are_moved_to_a_device_are_known() -> None:
    class Moved(type(build("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **named: Any) -> Any:
            hidden = self.model(input_ids=input_ids, **named).last_hidden_state
            return CausalLMOutput(logits=self.lm_head(hidden).to(hidden.device))

    model = build("llama")
    model.__class__ = Moved
    assert find_logit_map(model) == LogitMap()
    assert find_logit_map(model.to("meta")) == LogitMap()


@pytest.mark.parametrize("name", ["make_targets", "sum_losses", "sum_smoothed_losses", "observe"])
def test_a_task_with_a_way_of_its_own_takes_the_logits(name: str) -> None:
    own: Any = type("Own", (type(TASK),), {name: lambda *_, **__: None})
    assert not own().judges_words
    assert TASK.judges_words


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}])
def test_an_adapted_head_is_left_to_its_logits(settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", **settings))
    assert plain_head(model) is None
    assert find_head_loss(model) is None


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}])
def test_adapters_and_a_trained_copy_of_the_head_keep_their_gradients(more: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **more)
    model = get_peft_model(build("llama"), lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    compare(model)


def test_a_loss_of_its_own_is_taken_of_logits() -> None:
    class Own(type(TASK)):  # type: ignore[misc]
        def sum_losses(self, logits: Any, targets: Any, labels: Any) -> Any:
            return logits.sum() * 0.0

    assert Objective.of_model(build("llama"), Own(), Labels()).head is None


def test_a_model_on_several_devices_is_left_to_its_logits() -> None:
    """accelerate moves the inputs of each module to its device; targets would stay behind."""
    from accelerate import dispatch_model

    model = build("llama")
    parts = {name: "cpu" for name, _ in model.named_children()}
    spread = dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    assert plain_head(spread) is None
