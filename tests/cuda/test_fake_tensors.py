"""What a rank does with tensors, on fake ones of a GPU.

A CUDA build of torch tells from them whether two devices meet, and whether the host has to wait for
a value. They have no values, and no backward pass without a driver.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.data.load.batch import Batch, VarlenIndex
from llmtune.data.load.collate import Collator
from llmtune.data.store.token_store import Row
from llmtune.engine.deepspeed_fixes import norms_of
from llmtune.model.attention import answer_on_host
from llmtune.task.labels import LabelKind, Labels, Tags
from llmtune.task.language_head.chunked_loss import HeadLossSettings, sum_head_losses
from llmtune.task.language_head.head_loss import HeadLoss
from llmtune.task.language_head.logit_map import SAME, LogitMap
from llmtune.task.losses import sum_cross_entropy
from llmtune.task.objective import Objective
from llmtune.task.targets import Targets
from llmtune.task.task import find_task
from llmtune.varlen_attention import VARLEN, leave_out_masks, register_varlen

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch without CUDA: it knows no such device"
)

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
LAYERS = {"llama": GROUPED, "qwen3": GROUPED, "gemma2": GROUPED, "gpt_neox": {}}


def row(*lengths: int) -> Row:
    tokens = sum(lengths)
    ids = np.arange(tokens, dtype=np.int32)
    return Row(ids=ids % 60, mask=ids % 3 == 0, documents=lengths)


def labelled_row(tokens: int, labels: Labels) -> Row:
    ids, mask = np.arange(tokens, dtype=np.int32) + 1, np.arange(tokens) % 3 == 1
    kinds: dict[Any, Any] = {
        LabelKind.name: labels.names[0],
        LabelKind.value: 1.5,
        LabelKind.tags: Tags([labels.names[0]] * int(mask.sum())),
    }
    return Row(ids=ids, mask=mask, documents=(tokens,), label=kinds[labels.kind])


def fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The same batch in host memory, without its values."""
    return batch._map(lambda tensor: mode.from_tensor(tensor))


def make_model(kind: str, dtype: torch.dtype, attention: str) -> Any:
    config = AutoConfig.for_model(kind, **SHAPE, **LAYERS[kind])
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        ).requires_grad_(False)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ["padded", "masked", "packed"])
def test_a_forward_pass_and_its_loss_stay_on_the_device(
    kind: str, dtype: torch.dtype, rows: str
) -> None:
    collator = Collator(pad_token_id=0, masked=rows == "masked")
    given = [row(5, 4), row(7)] if rows == "packed" else [row(9), row(4), None]
    batch = collator.pack(given) if rows == "packed" else collator.pad(given)
    for attention in ("eager", "sdpa") if kind != "gemma2" else ("eager",):
        with FakeTensorMode() as mode, torch.no_grad():
            model = make_model(kind, dtype, attention)
            there = fake(batch, mode).to("cuda")
            logits = model(**there.inputs, use_cache=False).logits
            loss = sum_cross_entropy(logits, there.targets)
            total = torch.zeros((), dtype=torch.float64, device="cuda")
            total += loss
        assert logits.device.type == loss.device.type == total.device.type == "cuda"
        assert (logits.dtype, loss.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_by_borders_reads_none_of_them_on_the_host(
    kind: str, dtype: torch.dtype, packed: bool
) -> None:
    collator = Collator(pad_token_id=0, varlen=True, flat=True)
    batch = collator.pack([row(5, 4), row(7)]) if packed else collator.join([row(9), row(4), None])
    config = AutoConfig.for_model(kind, **SHAPE, **GROUPED)
    register_varlen()
    with FakeTensorMode() as mode, torch.no_grad():
        with torch.device("cuda"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=VARLEN
            )
        answer_on_host(model)
        leave_out_masks(model)
        there = fake(batch, mode).to("cuda")
        logits = model(**there.inputs, use_cache=False).logits
        loss = sum_cross_entropy(logits, there.targets)
    assert logits.shape[:2] == batch.input_ids.shape
    assert logits.device.type == loss.device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("settings", [{}, {"chunk_logits": 130}, {"summed_bytes": 0}], ids=str)
def test_a_loss_in_the_head_finds_its_gradients_on_the_device(
    dtype: torch.dtype, trained: bool, settings: dict[str, int]
) -> None:
    """The gradients are found in the forward pass."""
    about = HeadLossSettings(counts=True, smoothing=0.1, logit_map=LogitMap(cap=30.0), **settings)
    with FakeTensorMode():
        hidden = torch.empty(9, 32, dtype=dtype, device="cuda").requires_grad_()
        weight = torch.empty(64, 32, dtype=dtype, device="cuda").requires_grad_(trained)
        bias = torch.empty(64, dtype=dtype, device="cuda")
        values = torch.empty(9, dtype=torch.long, device="cuda")
        loss, correct = sum_head_losses(hidden, weight, bias, values, about)
        gradients = loss.grad_fn.gradients  # type: ignore[union-attr]
    made = [one for one, _ in gradients if one is not None]
    assert len(made) == 1 + trained
    assert {tensor.device.type for tensor in (loss, correct, *made)} == {"cuda"}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_model_is_asked_for_its_loss_on_the_device(kind: str) -> None:
    batch = Collator(pad_token_id=0).pad([row(9), row(4), None])
    with FakeTensorMode() as mode, torch.no_grad():
        model = make_model(kind, torch.bfloat16, "eager")
        # What a model makes of known logits cannot be found without values.
        head = HeadLoss(model.get_output_embeddings(), SAME)
        objective = Objective(find_task("causal_lm"), Labels(), head=head)
        objective.install()
        there = fake(batch, mode).to("cuda")
        run = partial(model, **there.inputs, use_cache=False)
        loss, observed = objective.judge(run, there.targets)
    assert {tensor.device.type for tensor in (loss, *observed.values())} == {"cuda"}


ENCODERS = {"bert": {}, "roberta": {"pad_token_id": 0}, "llama": {**GROUPED, "pad_token_id": 0}}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", ["sequence_classification", "token_classification", "regression"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_classifier_with_its_loss_and_what_metrics_need_stays_on_the_device(
    kind: str, name: str, attention: str
) -> None:
    task = find_task(name)
    labels = replace(task.default_labels, weights=tuple(0.5 for _ in task.default_labels.names))
    collator = Collator(
        pad_token_id=0,
        masked=True,
        token_types=kind == "bert",
        find_targets=partial(task.make_targets, labels=labels),
    )
    given = [labelled_row(9, labels), labelled_row(4, labels), None]
    config = AutoConfig.for_model(kind, **SHAPE, **ENCODERS[kind], num_labels=len(labels.names))
    with FakeTensorMode() as mode, torch.no_grad():
        with torch.device("cuda"):
            model: Any = getattr(transformers, task.model_class).from_config(
                config, dtype=torch.bfloat16, attn_implementation=attention
            )
        answer_on_host(model)
        there = fake(collator.pad(given), mode).to("cuda")
        logits = model(**there.inputs, use_cache=False).logits
        loss = task.sum_losses(logits, there.targets, labels)
        observed = task.observe(logits, there.targets)
    assert loss.dtype == torch.float32
    assert {tensor.device.type for tensor in (loss, *observed.values())} == {"cuda"}


def test_fake_tensors_tell_what_a_gpu_would() -> None:
    """The checks above can fail."""
    batch = Collator(pad_token_id=0).pad([row(9)])
    with FakeTensorMode() as mode, torch.no_grad():
        model = make_model("llama", torch.float32, "sdpa")
        here = fake(batch, mode)
        with pytest.raises(FakeTensorDeviceMismatchError):
            model(**here.inputs)
        there = here.to("cuda")
        loss = sum_cross_entropy(model(**there.inputs).logits, there.targets)
        with pytest.raises(DataDependentOutputException):
            float(loss)


def test_every_tensor_of_a_batch_goes_along() -> None:
    flat = Collator(pad_token_id=0, varlen=True).pack([row(5, 4), row(7)])
    with FakeTensorMode() as mode:
        there = fake(flat, mode).to("cuda")
    seen = []
    for field in fields(there):
        value = getattr(there, field.name)
        inside = (
            [getattr(value, name.name) for name in fields(value)]
            if isinstance(value, Targets | VarlenIndex)
            else [value]
        )
        seen += [tensor.device.type for tensor in inside if isinstance(tensor, torch.Tensor)]
    assert seen == ["cuda"] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norms_and_adamw_ask_the_device_for_nothing(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        weights = [
            torch.zeros(shape, device="cuda", dtype=dtype) for shape in ((4, 8), (8,), (3, 3, 2))
        ]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        norms = norms_of([weight.grad for weight in weights])  # type: ignore[misc]
        assert [(norm.device.type, norm.dtype) for norm in norms] == [("cuda", torch.float64)] * 3
        adamw = torch.optim.AdamW(weights, lr=1e-3)
        adamw.step()
        assert all(state["exp_avg"].device.type == "cuda" for state in adamw.state.values())
