"""An adapter to go on from: whatever peft writes is built as peft builds it, or refused with the
reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError, ConfigError
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.run.adapter import adopt_adapter, check_adapter
from llmtune.storage.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmtune.tuner.peft_model import add_lora, load_adapter
from llmtune.tuner.stored_adapter import (
    PEFT_DEFAULTS,
    read_stored_adapter,
)

#: What versions of peft before 0.6 did not write; 0.18 and later write more.
NEWER_KEYS = {
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "loftq_config",
    "megatron_core",
}

TRAINED: dict[str, dict[str, Any]] = {
    "a list of names": {"target_modules": ["q_proj", "v_proj"]},
    "whole names": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    },
    "a regular expression": {
        "target_modules": r".*\.layers\.1\.(self_attn\.[qk]_proj|mlp\.down_proj)"
    },
    "all linear": {"target_modules": "all-linear"},
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
    "ranks by name": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 8},
    },
    "scales by name": {
        "target_modules": "all-linear",
        "alpha_pattern": {"q_proj": 3200, "^model.layers.1.mlp.up_proj": 1},
    },
    "ranks and scales": {
        "target_modules": ["o_proj"],
        "rank_pattern": {"0.self_attn.o_proj": 3},
        "alpha_pattern": {"o_proj": 5},
    },
    "rank-stabilised": {
        "target_modules": ["q_proj"],
        "use_rslora": True,
        "rank_pattern": {"1.self_attn.q_proj": 9},
    },
    "a broken scale": {"target_modules": ["q_proj"], "lora_alpha": 2.5},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "without some, by expression": {
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": r".*0\.self_attn\.k_proj",
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers by pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "with dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "dora with a scale for large ranks": {
        "target_modules": "all-linear",
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
    },
    "norms too": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "started otherwise": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}

REFUSED = {
    "a bias of B": ({"lora_bias": True}, "lora_bias=true"),
    "rows of the embedding": (
        {"trainable_token_indices": [3, 4]},
        "trainable_token_indices=[3, 4]",
    ),
    "the embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        "not LoRA matrices of linear layers",
    ),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changed the base"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights=olora changed the base"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS"),
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Callable[[], Any]:
    """A fresh copy of the tiny model in fp32."""
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def write(model: Any, folder: Path, **settings: Any) -> Path:
    """An adapter as peft writes it, with matrices that change the answers."""
    torch.manual_seed(3)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj"],
            **settings,
        }
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    # Otherwise peft stores the base's weights of embedding and head along with their matrices.
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def adopted(folder: Path | str, *overrides: str) -> Config:
    """The config of a run that goes on from an adapter, checked against the model's shape."""
    composed = adopt_adapter(
        compose_config(["model=tiny", f"tuner.adapter_path={folder}", "precision=fp32", *overrides])
    )
    check_adapter(
        composed.config,
        resolve_shape(composed.config.model, composed.config.tuner),
        Path("/no/run"),
    )
    return composed.config


def change(folder: Path, **settings: Any) -> None:
    """Edit the settings of an adapter folder; None takes a key away."""
    file = folder / ADAPTER_CONFIG
    values = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.as_tensor(model.eval()(torch.arange(40).view(2, 20)).logits)


@pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)
def test_what_is_built_answers_as_peft_does(
    settings: dict[str, Any], base: Callable[[], Any], tmp_path: Path
) -> None:
    folder = write(base(), tmp_path / "adapter", **settings)
    tuner = adopted(folder).tuner
    model = add_lora(base(), tuner, "base", 0)
    load_adapter(model, folder)
    wanted = logits(PeftModel.from_pretrained(base(), str(folder)))
    assert torch.equal(logits(model), wanted)
    assert not torch.allclose(wanted, logits(base()), atol=1e-3)


def test_weights_of_the_base_in_an_adapter_are_refused(
    base: Callable[[], Any], tmp_path: Path
) -> None:
    """They may be other than the base's, as after an extension of the vocabulary."""
    get_peft_model(base(), LoraConfig(target_modules=["lm_head"])).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="lm_head.base_layer.weight; merge it"):
        adopted(tmp_path)


def test_what_goes_on_is_written_as_it_came(base: Callable[[], Any], tmp_path: Path) -> None:
    """A checkpoint of such a run has the patterns, and the next run goes on from it."""
    settings = TRAINED["ranks and scales"]
    first = write(base(), tmp_path / "first", **settings)
    model = add_lora(base(), adopted(first).tuner, "base", 0)
    load_adapter(model, first)
    model.save_pretrained(str(tmp_path / "second"))
    again = add_lora(base(), adopted(tmp_path / "second").tuner, "base", 0)
    load_adapter(again, tmp_path / "second")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "absent", [set(), NEWER_KEYS, NEWER_KEYS | {"revision", "layers_pattern", "r", "lora_alpha"}]
)
def test_absent_settings_mean_pefts_defaults(
    absent: set[str], base: Callable[[], Any], tmp_path: Path
) -> None:
    numbers = {"r": 8, "lora_alpha": 8} if "r" in absent else {}
    folder = write(base(), tmp_path / "adapter", **numbers)
    change(folder, **dict.fromkeys(absent))
    model = add_lora(base(), adopted(folder).tuner, "base", 0)
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base(), str(folder))))


def test_the_defaults_are_those_of_peft() -> None:
    own = {
        item.name: getattr(LoraConfig(), item.name)
        for item in fields(LoraConfig)
        if item.name in PEFT_DEFAULTS
    }
    assert own == PEFT_DEFAULTS, peft.__version__


@pytest.mark.parametrize(("settings", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_trained_here_is_refused_with_the_reason(
    settings: dict[str, Any], part: str, base: Callable[[], Any], tmp_path: Path
) -> None:
    folder = write(base(), tmp_path / "adapter", **settings)
    with pytest.raises(CheckpointError, match="tuner.adapter_path") as caught:
        adopted(folder)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"something_new": {"a": 1}}, 'something_new={"a": 1}'),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters="),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=[5]"),
        ({"r": 0}, "r=0 is not a rank"),
        ({"rank_pattern": {"q_proj": "x"}}, "q_proj=x is not a rank"),
    ],
)
def test_settings_of_the_future_are_refused_by_name(
    settings: dict[str, Any], part: str, base: Callable[[], Any], tmp_path: Path
) -> None:
    folder = write(base(), tmp_path / "adapter")
    change(folder, **settings)
    with pytest.raises(CheckpointError) as caught:
        adopted(folder)
    assert part in str(caught.value)


def edit(folder: Path, change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change_tensors(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("edited", "part"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "that random needs are not in it"),
        (
            lambda tensors: tensors.update(
                {
                    "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(
                        4, 64
                    )
                }
            ),
            "belong to no adapted layer",
        ),
        (
            lambda tensors: tensors.update({sorted(tensors)[0]: torch.ones(4, 99)}),
            "is 4 x 99 there",
        ),
        (
            lambda tensors: tensors.update(
                {name: tensor.T.contiguous() for name, tensor in tensors.items()}
            ),
            "is 64 x 4 there and 4 x 64 in random",
        ),
        (
            lambda tensors: tensors.update({sorted(tensors)[0]: torch.full((4, 64), float("nan"))}),
            "holds NaN",
        ),
        (lambda tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    edited: Callable[[dict[str, torch.Tensor]], Any],
    part: str,
    base: Callable[[], Any],
    tmp_path: Path,
) -> None:
    folder = write(base(), tmp_path / "adapter")
    edit(folder, edited)
    with pytest.raises(CheckpointError) as caught:
        adopted(folder)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 0},
        {"lora_alpha": "8"},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": {"q_proj": 0}},
    ],
    ids=str,
)
def test_a_scale_that_is_none_is_refused(
    settings: dict[str, Any], base: Callable[[], Any], tmp_path: Path
) -> None:
    """With 0 nothing would be learned, and a text would end the ranks."""
    change(write(base(), tmp_path / "adapter"), **settings)
    with pytest.raises(CheckpointError, match="is not a scale: a number other than 0 is"):
        adopted(tmp_path / "adapter")


def test_an_adapter_of_another_rank_than_its_settings_is_refused(
    base: Callable[[], Any], tmp_path: Path
) -> None:
    folder = write(base(), tmp_path / "adapter")
    change(folder, r=2)
    with pytest.raises(CheckpointError, match="is no adapter of random"):
        adopted(folder)


def test_broken_folders_are_refused(base: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter here"):
        adopted(tmp_path / "none")
    folder = write(base(), tmp_path / "adapter")
    data = (folder / ADAPTER_WEIGHTS).read_bytes()
    for cut in (0, 7, 60):
        (folder / ADAPTER_WEIGHTS).write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="cannot be read as an adapter"):
            read_stored_adapter(folder)
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="convert adapter_model.bin"):
        adopted(folder)
    (folder / ADAPTER_CONFIG).write_text("[1]")
    with pytest.raises(CheckpointError, match="holds no settings"):
        adopted(folder)


def test_what_the_user_asks_for_must_be_the_adapters(
    base: Callable[[], Any], tmp_path: Path
) -> None:
    folder = write(base(), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    same = adopted(
        folder, "tuner.lora_r=4", "tuner.lora_alpha=8", "tuner.target_modules=[v_proj,q_proj]"
    ).tuner
    assert (same.lora_r, same.lora_alpha) == (4, 8)
    # 16 is the default too, and was asked for all the same.
    for override in (
        "tuner.lora_r=16",
        "tuner.lora_alpha=32",
        "tuner.use_rslora=true",
        "tuner.rank_pattern={q_proj: 2}",
    ):
        with pytest.raises(ConfigError, match="leave it out") as caught:
            adopted(folder, override)
        assert override.partition("=")[0] in str(caught.value)
    with pytest.raises(CheckpointError, match="that random needs are not in it"):
        adopted(folder, "tuner.target_modules=[q_proj,v_proj,o_proj]")


def test_a_tilde_is_the_home_folder(
    base: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(base(), tmp_path / "adapter")
    assert adopted("~/adapter").tuner.lora_r == 4
