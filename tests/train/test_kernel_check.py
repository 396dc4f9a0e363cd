"""Kernels are compared with the plain modules before step 1, and dropped where they differ."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from llmtune.config.groups.model import Kernels, ModelConfig
from llmtune.engine.distributed import Rank
from llmtune.model.kernels import rms_norm
from llmtune.model.kernels.replacement import rounding_limit
from llmtune.model.kernels.rms_norm import has_kernel
from llmtune.storage import layout
from llmtune.train.hooks import kernel_check
from llmtune.train.hooks.kernel_check import use_kernels
from tests.model.test_kernels import (
    build,
    logits_and_gradients,
    make_apply,
    pretend_liger,
    with_adapters,
)
from tests.support import largest_difference, losses, run_cli

RANK = Rank(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def as_module(model: Any) -> Any:
    """What of a training module is asked for."""

    def logits(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            answer: torch.Tensor = model.eval()(**batch.inputs, use_cache=False).logits
        return answer

    return SimpleNamespace(model=model, rank=RANK, logits=logits)


def use(
    model: Any, asked: Kernels, dtype: torch.dtype = torch.float32, rank: Rank = RANK
) -> tuple[Any, list[str]]:
    said: list[str] = []
    module, config = as_module(model), ModelConfig(name_or_path="m", kernels=asked)
    module.rank = rank
    return use_kernels(module, config, 128, dtype, False, said.append), said


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels of a GPU, and compute on the CPU."""
    monkeypatch.setattr(kernel_check, "resolve_kernels", lambda asked, *_: asked)
    monkeypatch.setattr(kernel_check, "has_kernel", lambda _: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3n_text"])
def test_what_is_right_is_used(family: str, dtype: torch.dtype) -> None:
    model = with_adapters(build(family, dtype)) if family == "llama" else build(family, dtype)
    model = model.to(dtype)
    expected = model.eval()(input_ids=torch.arange(1, 13)[None]).logits.detach()
    used, said = use(model, Kernels.torch, dtype)
    assert {one.kind for one in used} == (
        {"RMSNorm", "LoRA sum"} if family == "llama" else {"RMSNorm"}
    )
    (line,) = said
    assert line.startswith("kernels: ")
    assert line.endswith(" replaced; they compute the same within rounding")
    assert all(one.seen.difference is not None or one.is_proved for one in used)
    assert any(one.seen.difference is not None for one in used)
    found = model(input_ids=torch.arange(1, 13)[None]).logits.detach()
    apart = (found - expected).float().norm() / expected.float().norm()
    assert float(apart) < 10 * rounding_limit(dtype)


def test_a_cpu_takes_what_is_faster_there() -> None:
    model = with_adapters(build("llama"))
    assert use(model, Kernels.none) == ([], [])
    assert use(model, Kernels.auto, torch.bfloat16) == ([], [])
    assert use(build("llama"), Kernels.auto) == ([], []), "norms are not faster"
    assert use(build("gemma"), Kernels.torch) == ([], [])
    assert all("forward" not in module.__dict__ for module in model.modules())
    used, _ = use(model, Kernels.auto)
    assert {one.kind for one in used} == {"LoRA sum"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_constant_is_found_in_the_model_itself_and_dropped(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the trial on random numbers had let it through."""
    monkeypatch.setattr(rms_norm, "is_right", lambda *_: True)
    monkeypatch.setattr(
        rms_norm,
        "_make_fast",
        lambda width, eps: (
            lambda module, x: functional.rms_norm(x, (width,), module.weight, eps + 0.1)
        ),
    )
    model = build("llama", dtype)
    used, said = use(model, Kernels.torch, dtype)
    assert used == []
    assert all("forward" not in module.__dict__ for module in model.modules())
    (line,) = said
    assert line.startswith("model.kernels: RMSNorm x 5 not used (first: model.layers.0.input_lay")
    assert f"up to {rounding_limit(dtype):.1e} is rounding" in line


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("wrong", "lost", "told"),
    [
        ("", "", None),
        ("rope", "Liger's apply_rotary_pos_emb", "differs by 1.0e+00"),
        ("swiglu", "Liger's LlamaMLP", "RuntimeError: no such kernel"),
        ("rms_norm", "Liger's LlamaRMSNorm", None),
    ],
)
def test_a_kernel_of_liger_that_is_wrong_or_fails_is_dropped(
    wrong: str, lost: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    file: Any = modeling_llama
    plain = file.apply_rotary_pos_emb
    pretend_liger(monkeypatch, {"llama": make_apply([], wrong)})
    model = with_adapters(build("llama"))
    try:
        used, said = use(model, Kernels.liger)
        kinds = {one.kind for one in used}
        every = {"Liger's LlamaMLP", "Liger's apply_rotary_pos_emb", "Liger's LlamaRMSNorm"}
        # torch's norms stand in for those of Liger that are wrong.
        assert kinds == (every - {lost}) | {"LoRA sum"} | (
            {"RMSNorm"} if wrong == "rms_norm" else set()
        )
        assert len(said) == (1 if told is None else 2)
        assert told is None or told in said[1]
        assert (file.apply_rotary_pos_emb is plain) == (wrong == "rope")
        assert logits_and_gradients(model)[0].isfinite().all()
    finally:
        file.apply_rotary_pos_emb = plain


@pytest.mark.usefixtures("on_a_gpu")
def test_torchs_functions_are_taken_where_liger_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_liger(monkeypatch, {})
    used, said = use(build("qwen2"), Kernels.liger)
    assert {one.kind for one in used} == {"RMSNorm"}
    assert said[0] == "kernels: Liger has no kernels for qwen2; torch's functions are taken instead"
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    assert "liger-kernel cannot be imported" in use(build("qwen2"), Kernels.liger)[1][0]


def test_norms_are_asked_for_where_torch_has_no_kernel_for_the_device() -> None:
    assert not has_kernel(torch.device("meta"))
    assert not has_kernel(torch.device("cpu"))
    if not torch.backends.cuda.is_built():
        assert not has_kernel(torch.device("cuda"))
    other = replace(RANK, device=torch.device("meta"))
    assert use(build("llama"), Kernels.auto, rank=other) == ([], [])


def test_ranks_replace_what_all_of_them_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_the_last(keys: list[str], _: Any) -> list[list[str]]:
        return [keys, keys[:-1]]

    def not_the_first(flags: list[bool], _: Any) -> list[bool]:
        return [True, *flags[1:]]

    monkeypatch.setattr(kernel_check, "gather_objects", without_the_last)
    monkeypatch.setattr(kernel_check, "all_reduce_any", not_the_first)
    used, said = use(build("llama"), Kernels.torch)
    assert len(used) == 3
    assert "x 1 not used" in said[1]
    assert "different on another one" in said[1]


JOB = [
    *("model=tiny", "tuner=lora", "precision=fp32", "train.max_steps=2", "export=none"),
    *("optim.learning_rate=1e-3", "train.sample_answers=false", "train.eval_max_rows=8"),
    *("train.save_steps=null", "launch.nproc=2"),
]


def train(folder: Path, *overrides: str) -> tuple[str, list[float]]:
    done = run_cli(*JOB, *overrides, f"output_dir={folder}", timeout=600)
    assert done.code == 0, done.err
    return done.out, losses(folder)


@pytest.mark.process
@pytest.mark.parametrize(
    "overrides",
    [
        ["zero=3", "train.gradient_checkpointing=true"],
        pytest.param(["zero=2"], marks=pytest.mark.slow),
        pytest.param(["zero=3", "tuner=full"], marks=pytest.mark.slow),
        pytest.param(["zero=2", "train.compile=layers"], marks=pytest.mark.slow),
        pytest.param(["zero=2", "tuner=qlora", "precision=bf16"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_run_with_torchs_functions_has_the_losses_of_one_without(
    overrides: list[str], tmp_path: Path
) -> None:
    _, expected = train(tmp_path / "plain", *overrides)
    out, found = train(tmp_path / "fast", *overrides, "model.kernels=torch")
    assert "kernels: " in out
    assert "not used" not in out
    limit = 1e-5 if "precision=bf16" not in overrides else 2e-2
    assert largest_difference(expected, found) < limit
    plan = json.loads((tmp_path / "fast" / layout.PLAN).read_text())
    assert "elementwise kernels: torch (model.kernels)" in json.dumps(plan)
