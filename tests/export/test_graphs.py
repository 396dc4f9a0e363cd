"""ONNX and TorchScript graphs: the outputs of transformers for every batch, and refusal where they
would not be.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.errors import ExportError, MissingPrerequisiteError
from llmtune.export.formats.format import find_format
from llmtune.export.open_model import open_export_model
from llmtune.export.pipeline import write_files
from llmtune.export.publish.shards import Journal
from llmtune.export.request import ExportRequest
from llmtune.export.writers.graph.graph_comparison import compare_graph, make_probe_batches
from llmtune.export.writers.graph.graph_model import GraphModel, find_loader, load_graph_model
from llmtune.storage.tensors.tensor_spec import TensorSpec
from tests.export.conftest import copy_tokenizer, make_adapter

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
#: Numbers as large as those of a trained model; with the usual ones every output is nearly zero.
SPREAD = {"initializer_range": 0.2}
ENCODER: dict[str, Any] = {
    **SIZES,
    **SPREAD,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
DECODER: dict[str, Any] = {**SIZES, **SPREAD, "intermediate_size": 64, "num_key_value_heads": 1}
GPT2: dict[str, Any] = {
    **SPREAD,
    "vocab_size": 320,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 48,
}
#: Padding that is not 0: positions of RoBERTa begin behind it.
ROBERTA: dict[str, Any] = {**ENCODER, "pad_token_id": 1, "type_vocab_size": 1}

CONFIGS: dict[str, Callable[[], Any]] = {
    "BertForSequenceClassification": lambda: BertConfig(**ENCODER | {"num_labels": 3}),
    "BertForTokenClassification": lambda: BertConfig(**ENCODER | {"num_labels": 5}),
    "BertForMaskedLM": lambda: BertConfig(**ENCODER),
    "BertModel": lambda: BertConfig(**ENCODER),
    "RobertaForSequenceClassification": lambda: RobertaConfig(**ROBERTA | {"num_labels": 2}),
    "RobertaForMaskedLM": lambda: RobertaConfig(**ROBERTA),
    "LlamaForCausalLM": lambda: LlamaConfig(**DECODER, pad_token_id=319),
    "LlamaForSequenceClassification": lambda: LlamaConfig(
        **DECODER | {"pad_token_id": 2, "num_labels": 3}
    ),
    "GPT2LMHeadModel": lambda: GPT2Config(**GPT2),
}


def make_model(architecture: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    config = CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def write(
    kind: str, base: Path, output: Path, adapter: Path | None = None, **settings: Any
) -> Path:
    config = ExportConfig(format=kind, **settings)
    export_model = open_export_model(
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output), config
    )
    output.mkdir()
    write_files(export_model, output, Journal(output, "test"), config)
    return output


def batches(with_types: bool) -> Iterator[tuple[torch.Tensor, ...]]:
    """Sizes that the export itself does not try, padded on either side."""
    torch.manual_seed(11)
    for rows, length, left in ((2, 9, False), (6, 4, True), (1, 30, False), (3, 21, True)):
        ids, places = (
            torch.randint(3, 300, (rows, length)),
            torch.arange(length).expand(rows, length),
        )
        padding = torch.arange(rows)[:, None] % length
        mask = (places >= padding) if left else (places < length - padding)
        types = (places > length // 2).long()
        yield (ids, mask.long(), types)[: 3 if with_types else 2]


def compare(run: Callable[..., torch.Tensor], model: Any, output: str, with_types: bool) -> None:
    for inputs in batches(with_types):
        named = dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=False))
        with torch.no_grad():
            expected, found = getattr(model(**named), output), run(*inputs)
        assert found.shape == expected.shape
        assert expected.std() > 0.05, "numbers too small to tell one model from another"
        real = inputs[1].bool() if expected.ndim == 3 else slice(None)
        assert (found[real] - expected[real]).abs().max() < 1e-4


def load(folder: Path, architecture: str) -> Any:
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


def open_onnx(file: Path) -> tuple[Any, Callable[..., torch.Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        values = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, values)[0])

    return session, run


@pytest.mark.parametrize(
    ("architecture", "output"),
    [
        ("BertForSequenceClassification", "logits"),
        pytest.param("BertModel", "last_hidden_state", marks=pytest.mark.slow),
        pytest.param("RobertaForSequenceClassification", "logits", marks=pytest.mark.slow),
        ("LlamaForCausalLM", "logits"),
    ],
)
def test_an_onnx_graph_computes_what_transformers_does(
    tiny_model: Path, tmp_path: Path, architecture: str, output: str
) -> None:
    base = make_model(architecture, tmp_path / "base", tiny_model)
    folder = write("onnx", base, tmp_path / "out")
    session, run = open_onnx(folder / "model.onnx")
    with_types = architecture.startswith("Bert")
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if with_types else [])]
    assert [given.name for given in session.get_inputs()] == names
    assert [given.shape for given in session.get_inputs()] == [["batch", "sequence"]] * len(names)
    assert [given.name for given in session.get_outputs()] == [output]
    compare(run, load(base, architecture), output, with_types)
    assert not [file for file in folder.iterdir() if file.is_dir() or file.suffix == ".safetensors"]
    assert transformers.AutoTokenizer.from_pretrained(folder)("the")["input_ids"]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert (folder / "generation_config.json").is_file() == ("CausalLM" in architecture)
    assert (
        str(Path(transformers.__file__).parent).encode() not in (folder / "model.onnx").read_bytes()
    )


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_a_torchscript_graph_computes_what_transformers_does(
    tiny_model: Path, tmp_path: Path, architecture: str
) -> None:
    base = make_model(architecture, tmp_path / "base", tiny_model)
    folder = write("torchscript", base, tmp_path / "out")
    graph: Any = torch.jit.load(str(folder / "model.ts.pt"))
    output = "last_hidden_state" if architecture == "BertModel" else "logits"
    compare(graph, load(base, architecture), output, architecture.startswith("Bert"))
    assert not [
        file
        for file in folder.iterdir()
        if file.is_dir() or file.suffix in (".safetensors", ".tmp")
    ]
    with zipfile.ZipFile(folder / "model.ts.pt") as archive:
        programs = [archive.read(name) for name in archive.namelist() if "/code/" in name]
    assert programs
    assert not any(b"site-packages" in program for program in programs)


def test_an_adapter_is_in_the_graph_without_rounding(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("LlamaForCausalLM", tmp_path / "base", tiny_model)
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(
        base
    )
    adapter = make_adapter(base, tmp_path / "adapter")
    graph: Any = torch.jit.load(
        str(write("torchscript", base, tmp_path / "out", adapter) / "model.ts.pt")
    )
    unmerged: Any = PeftModel.from_pretrained(load(base, "LlamaForCausalLM"), adapter).eval()
    compare(graph, unmerged, "logits", with_types=False)


@pytest.mark.slow
def test_one_matrix_for_input_and_output_is_in_an_onnx_file_once(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model(
        "LlamaForCausalLM",
        tmp_path / "base",
        tiny_model,
        tie_word_embeddings=True,
        vocab_size=20_000,
        pad_token_id=2,
    )
    folder = write("onnx", base, tmp_path / "out")
    weights = (base / "model.safetensors").stat().st_size
    assert weights < (folder / "model.onnx").stat().st_size < 1.1 * weights
    assert not list(folder.glob("*.data"))


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_the_graph_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, architecture: str
) -> None:
    base = make_model(architecture, tmp_path / "base", tiny_model)
    model = load_graph_model(base, *find_loader(base))
    checks = make_probe_batches(model)
    with torch.no_grad():
        assert compare_graph(lambda inputs: model(*inputs), checks, "same") < 1e-5
        with pytest.raises(
            ExportError, match=r"rows of \d+ tokens its output differs .* allowed are 0.001"
        ):
            compare_graph(
                lambda inputs: model(inputs[0], torch.ones_like(inputs[1]), *inputs[2:]),
                checks,
                "no mask",
            )
        next(weight for name, weight in model.named_parameters() if "norm.weight" in name.lower())[
            0
        ] += 0.1
        with pytest.raises(ExportError, match="moved is not the model"):
            compare_graph(lambda inputs: model(*inputs), checks, "moved")
        with pytest.raises(ExportError, match="differs from transformers' by nan"):
            compare_graph(lambda inputs: model(*inputs) * torch.nan, checks, "nan")
        with pytest.raises(ExportError, match="gives .* transformers gives"):
            compare_graph(lambda inputs: model(*inputs)[..., :1], checks, "smaller")


def test_a_graph_that_was_made_for_one_length_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("BertForSequenceClassification", tmp_path / "base", tiny_model)
    model = load_graph_model(base, *find_loader(base))

    def run(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        result: torch.Tensor = model(*(tensor.reshape(2, 7) for tensor in inputs))
        return result

    with pytest.raises(ExportError, match="fixed cannot run 1 rows of 1 tokens"):
        compare_graph(run, make_probe_batches(model), "fixed")


@dataclass(frozen=True)
class Large:
    """The names of a model that would be too large."""

    specs: dict[str, TensorSpec]

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        raise AssertionError(f"{name} is not to be read")


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_what_cannot_be_a_graph_is_refused(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    base = make_model("BertForSequenceClassification", tmp_path / "base", tiny_model)
    problem = find_format(kind).find_problems(ExportConfig(format=kind, dtype=ExportDtype.bf16))
    assert "export.dtype=bf16: graphs are written in fp32" in str(problem)

    config, out = ExportConfig(format=kind), tmp_path / "large"
    out.mkdir()
    export_model = open_export_model(
        ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=out), config
    )
    large = Large({"a": TensorSpec("a", torch.bfloat16, (70_000, 1_000_000))})
    with pytest.raises(
        ExportError, match=r"70\.0 B parameters are more than 3\.0 B; take export=gguf"
    ):
        write_files(replace(export_model, source=large), out, Journal(out, "test"), config)

    settings = base / "config.json"
    for named in (["T5ForConditionalGeneration"], ["Speech2TextEncoder"], None):
        settings.write_text(
            json.dumps({**json.loads(settings.read_text()), "architectures": named})
        )
        with pytest.raises(ExportError, match=r"is neither an encoder nor a decoder of text"):
            write(kind, base, tmp_path / f"{named}")


def test_a_head_that_was_never_trained_is_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("BertForSequenceClassification", tmp_path / "base", tiny_model)
    tensors = load_file(base / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"has 1 weights that are not there: classifier\.weight"):
        write("torchscript", base, tmp_path / "out")


def test_what_torch_cannot_export_is_refused_with_its_reason(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model(
        "LlamaForSequenceClassification", tmp_path / "base", tiny_model, pad_token_id=None
    )
    with pytest.raises(
        ExportError,
        match=r"cannot write LlamaForSequenceClassification as TorchScript: .*padding token",
    ):
        write("torchscript", base, tmp_path / "out")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_before_any_weights_are_written(
    tiny_model: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model("BertModel", tmp_path / "base", tiny_model)
    # What Python itself takes for a package that cannot be imported.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPrerequisiteError,
        match=rf'export=onnx needs {package} .*pip install "llmtune\[onnx\]"',
    ):
        write("onnx", base, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert "config.json" in written
    assert not {name for name in written if "onnx" in name or "weights" in name}


def test_a_graph_model_takes_tensors_and_gives_one(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("BertModel", tmp_path / "base", tiny_model)
    model = load_graph_model(base, *find_loader(base))
    assert isinstance(model, GraphModel)
    assert (model.inputs, model.output) == (
        ("input_ids", "attention_mask", "token_type_ids"),
        "last_hidden_state",
    )
    sizes = [tuple(check.inputs[0].shape) for check in make_probe_batches(model)]
    assert len({length for _, length in sizes}) == len(sizes)
    assert max(length for _, length in sizes) == 48, "the longest row is as long as the model takes"
    assert (2, 7) not in sizes, "no check is the batch that the graph is made from"
