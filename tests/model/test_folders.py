"""Model folders that are derived from a base's: scaled positions, and the text part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.model.source import resolve_model_folder
from llmtune.model.weights.check import compare_weights
from llmtune.plan.architecture.load import load_architecture

TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
#: Settings that every language model has.
SMALL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


@pytest.fixture
def vision_model(tmp_path: Path) -> Path:
    """A folder of a model that also reads images, as the hub has Gemma 3."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config=TEXT,
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        image_token_index=63,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "processor_config.json").write_text("{}")
    (tmp_path / "both" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "both"


def named(folder: Path, **config: Any) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), config={"model_type": "gemma3_text", **config})


def test_the_text_part_is_the_language_model(vision_model: Path, tmp_path: Path) -> None:
    folder = resolve_model_folder(named(vision_model), tmp_path)
    whole: Any = AutoModelForCausalLM.from_pretrained(vision_model).eval()
    text: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(text).__name__ == "Gemma3ForCausalLM"
    assert compare_weights(text, folder).missing == ()
    assert compare_weights(text, folder).unused == ()
    tokens = torch.randint(60, (1, 20))
    with torch.no_grad():
        assert torch.equal(text(input_ids=tokens).logits, whole(input_ids=tokens).logits)
    assert (folder / "tokenizer_config.json").is_file()
    assert not (folder / "processor_config.json").exists()
    assert resolve_model_folder(named(vision_model), tmp_path) == folder


LLAMA = {"model_type": "llama", **{key: TEXT[key] for key in SMALL}}


@pytest.mark.parametrize(
    ("kind", "text", "vision", "others"),
    [
        ("gemma3", TEXT, "siglip_vision_model", {"mm_tokens_per_image": 4}),
        ("llava", LLAMA, "clip_vision_model", {}),
        ("llava", {**LLAMA, "tie_word_embeddings": True}, "clip_vision_model", {}),
        ("mistral3", {**LLAMA, "model_type": "mistral"}, "pixtral", {}),
        ("internvl", {**LLAMA, "model_type": "qwen2"}, "internvl_vision", {}),
    ],
)
def test_who_names_the_folder_alone_trains_the_text_part(
    kind: str, text: dict[str, Any], vision: str, others: dict[str, Any], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config={"model_type": vision, **VISION},
        image_token_index=63,
        tie_word_embeddings=text.get("tie_word_embeddings", kind == "gemma3"),
        **others,
    )
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "both")
    model = ModelConfig(name_or_path=str(tmp_path / "both"))
    folder = resolve_model_folder(model, tmp_path)
    part: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert compare_weights(part, folder).missing == ()
    planned = load_architecture(model)
    assert type(planned) is type(part.config)
    for key in (*SMALL, "tie_word_embeddings"):
        assert getattr(planned, key) == getattr(part.config, key), key
    tokens = torch.randint(60, (1, 20))
    with torch.no_grad():
        assert torch.equal(part(input_ids=tokens).logits, whole(input_ids=tokens).logits)


def test_another_shape_than_the_text_part_has_is_refused(
    vision_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="hidden_size: model.config says 33"):
        resolve_model_folder(named(vision_model, hidden_size=33), tmp_path)


def test_names_that_are_no_language_model_are_refused(vision_model: Path, tmp_path: Path) -> None:
    file = vision_model / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({f"x.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(MissingPrerequisiteError, match="no tensor of a language model"):
        resolve_model_folder(named(vision_model), tmp_path)


def test_an_older_form_of_the_positions_is_the_same_architecture(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stored = json.loads((folder / "config.json").read_text())
    del stored["rope_parameters"]
    stored |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8}}
    (folder / "config.json").write_text(json.dumps(stored))
    planned = {"rope_type": "linear", "type": "linear", "factor": 8.0, "rope_theta": 500000}
    config = {"model_type": "llama", "rope_parameters": planned}
    own = ModelConfig(name_or_path=str(folder), config=config)
    assert resolve_model_folder(own, tmp_path) == folder
    own.config = {"model_type": "llama", "rope_parameters": {**planned, "factor": 4.0}}
    with pytest.raises(ConfigError, match="rope_parameters: model.config says"):
        resolve_model_folder(own, tmp_path)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_the_scaled_folder_holds_the_weights_and_says_the_positions(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    given = ModelConfig(name_or_path=str(tiny_model), rope_scaling={"rope_type": kind, "factor": 2})
    folder = resolve_model_folder(given, tmp_path)
    assert folder != tiny_model
    assert resolve_model_folder(given, tmp_path) == folder
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    scaled: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert scaled.config.rope_parameters["rope_type"] == kind
    assert not torch.equal(scaled.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(scaled.state_dict()[name], tensor)


def test_a_random_model_is_scaled_too(cache: Path) -> None:
    given = ["model=tiny", "model.rope_scaling={rope_type: linear, factor: 2}"]
    folder = resolve_model_folder(compose_config(given).config.model, cache)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["factor"] == 2
