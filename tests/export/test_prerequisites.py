"""What an export could not do is said before the training, and what it can do is not refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.export.formats.format import FORMATS
from llmtune.export.prerequisites import check_exportable
from tests.support import TINY, run_cli


@pytest.mark.parametrize("kind", ["none", *FORMATS.list()])
def test_what_every_format_can_hold_is_not_refused(kind: str, tiny_model: Path) -> None:
    check_exportable(ExportConfig(format=kind), tiny_model)


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("gguf", "gguf"),
        ("bnb_4bit", "bitsandbytes"),
        *(("onnx", package) for package in ("onnx", "onnxruntime", "onnxscript")),
    ],
)
def test_a_package_that_is_missing_is_named(
    kind: str, package: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python itself takes for a package that cannot be imported.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPrerequisiteError, match=f"export={kind} needs {package} .*pip install"
    ):
        check_exportable(ExportConfig(format=kind), tiny_model)
    check_exportable(ExportConfig(format="safetensors"), tiny_model)


@pytest.mark.parametrize(
    "architecture", ["GemmaForCausalLM", "GPT2LMHeadModel", "LlamaForSequenceClassification"]
)
def test_an_architecture_that_gguf_does_not_know_is_named(
    architecture: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = with_config(tiny_model, tmp_path, architectures=[architecture])
    with pytest.raises(
        MissingPrerequisiteError,
        match=f"cannot write {architecture}.*the training, which has not begun",
    ):
        check_exportable(ExportConfig(format="gguf"), base)
    check_exportable(ExportConfig(format="safetensors"), base)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_for_gguf(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = with_config(tiny_model, tmp_path)
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(MissingPrerequisiteError, match="export=gguf"):
        check_exportable(ExportConfig(format="gguf"), base)


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq", "bits": 4}],
)
@pytest.mark.parametrize("kind", [one for one in FORMATS.list() if one != "adapter"])
def test_a_base_that_cannot_be_unpacked_is_refused_for_whatever_is_merged(
    kind: str, settings: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    base = with_config(tiny_model, tmp_path, quantization_config=settings)
    with pytest.raises(
        MissingPrerequisiteError,
        match=r"the weights are quantized .*the training, which has not begun",
    ):
        check_exportable(ExportConfig(format=kind), base)
    for other in ("none", "adapter"):
        check_exportable(ExportConfig(format=other), base)
    (base / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    check_exportable(ExportConfig(format="safetensors"), base)


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_what_no_graph_is_made_of_is_refused(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    base = with_config(tiny_model, tmp_path, architectures=["WhisperForConditionalGeneration"])
    with pytest.raises(MissingPrerequisiteError, match="neither an encoder nor a decoder of text"):
        check_exportable(ExportConfig(format=kind), base)


def test_a_model_too_large_for_a_graph_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.export.writers.graph.graph_model.MOST_PARAMETERS", 1000)
    with pytest.raises(MissingPrerequisiteError, match="more than 1"):
        check_exportable(ExportConfig(format="torchscript"), tiny_model)


def test_an_upload_needs_its_token_and_its_driver(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(MissingPrerequisiteError, match="HF_TOKEN is not set"):
        check_exportable(ExportConfig(upload="hf://user/name"), tiny_model)
    check_exportable(ExportConfig(upload="hf://user/name", dry_run=True), tiny_model)
    check_exportable(ExportConfig(format="none", upload="hf://user/name"), tiny_model)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    check_exportable(ExportConfig(upload="hf://user/name@branch"), tiny_model)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        MissingPrerequisiteError, match=r"driver of s3:// is not installed: pip install s3fs"
    ):
        check_exportable(ExportConfig(upload="s3://bucket/run"), tiny_model)


@pytest.mark.parametrize("url", ["hf://name", "hf://datasets/name", "nowhere://bucket/run"])
def test_an_upload_without_an_address_is_a_problem_of_the_configuration(
    url: str, tiny_model: Path
) -> None:
    with pytest.raises(ConfigError, match="export.upload="):
        check_exportable(ExportConfig(upload=url), tiny_model)


@pytest.mark.process
def test_training_ends_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = run_cli(
        "train",
        *TINY,
        "data.train=stdlib_docs@50",
        "export.upload=hf://user/name",
        f"output_dir={tmp_path}/run",
    )
    assert done.code == 7, done.out + done.err
    assert "HF_TOKEN is not set" in done.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def with_config(model: Path, folder: Path, **changes: object) -> Path:
    """Links to a model's files, and its configuration with changes."""
    base = folder / "base"
    base.mkdir()
    for file in model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, **changes}))
    return base
