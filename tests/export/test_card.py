"""Model cards: true, complete, without secrets or traces of the machine, always the same, and with
code that runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from llmtune.config.compose import compose_config
from llmtune.config.groups.export import ExportConfig, ExportDtype, GgufType, MergeOnto
from llmtune.config.stored import dump_redacted
from llmtune.export.card.card import write_model_card
from llmtune.export.formats.format import FORMATS
from llmtune.export.request import ExportRequest
from llmtune.plan.memory.memory_plan import DeviceBytes, HostBytes, MemoryPlan
from tests.export.conftest import make_adapter
from tests.support import TINY, run_cli

SECRET = "s3cr3t-token|value*1"


def make_run(folder: Path, *overrides: str, **plan: Any) -> Path:
    """A run's files as training writes them, with numbers that can be looked for."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_redacted(compose_config([*TINY, *overrides]).config))
    counts = {
        "rows": 1234,
        "tokens": 56789,
        "trained_tokens": 4321,
        "dropped": 7,
        "truncated": 0,
        "skipped": 0,
    }
    memory = MemoryPlan(
        device=DeviceBytes(weights=3_000_000_000),
        host=HostBytes(runtime=800_000_000),
        nvme=0,
        nvme_written_per_step=0,
        checkpoint=5,
    )
    written = {
        "world_size": 8,
        "hardware": {"device_count": 8, "nodes": 1, "name": "A100"},
        "shape": {"parameters": 106816, "trainable_parameters": 32768},
        "placement": {"zero_stage": 3, "optimizer": "cpu", "param": "cpu"},
        "batch": {"global_batch_size": 64, "micro_batch_size": 2, "accumulation_steps": 4},
        "memory": asdict(memory),
        "tokens_per_second": 81743.0,
        "gradient_checkpointing": True,
        "recomputed": {"count": 16, "total": 80},
        "attn_implementation": "sdpa",
        "learning_rate": 0.000123,
        "steps": {"total_steps": 20, "warmup_steps": 1},
        "data": {
            "folder": str(folder / "cache"),
            "fingerprint": "8c325a01387b",
            "train": counts,
            "eval": {**counts, "rows": 99},
            "train_stores": [f"{folder}/tokens/f85de3351d61"],
        },
        "model_folder": str(folder / "base"),
        "run_name": "my-run",
        "history": [],
        **plan,
    }
    (folder / "plan.json").write_text(json.dumps(written))
    (folder / "environment.json").write_text(
        json.dumps({"llmtune": "0.0.9", "torch": "2.7.1", "platform": "Linux-x"})
    )
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.085}]
    for step in range(1, 21):
        lines.append(
            {
                "step": step,
                "loss": 3 - step / 10,
                "tokens_per_second": 1000.0 + step,
                "memory_bytes": 5_000_000_000,
            }
        )
        if step % 10 == 0:
            lines.append(
                {
                    "step": step,
                    "eval_loss": 3 - step / 20,
                    "eval_perplexity": 2.0,
                    "eval_accuracy": 0.75,
                }
            )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "lo'
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(
        tmp_path / "run", "data.train=[stdlib_docs@200,HuggingFaceH4/no_robots]", "precision=fp32"
    )


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


def write(folder: Path, request: ExportRequest, parity: str | None = None, **settings: Any) -> str:
    """The card; the export's files are those of the base where there are none."""
    if not folder.is_dir():
        shutil.copytree(request.base, folder)
    write_model_card(folder, request, ExportConfig(**settings), parity)
    return (folder / "README.md").read_text()


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_a_card_says_what_the_run_was(run: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        base=base,
        base_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        adapter=adapter,
        run=run,
        output=run / "merged",
    )
    text = write(tmp_path / "out", request, parity="0.12 % at most")
    for part in (
        "# my-run",
        "stdlib_docs@200, HuggingFaceH4/no_robots",
        "1,234 (56,789 tokens, 4,321 trained on); 7 dropped",
        "8c325a01387b",
        "f85de3351d61",
        "| rank | 4 |",
        "| alpha | 12 |",
        "down_proj, gate_proj, k_proj",
        "| learning rate | 0.000123 |",
        "cosine, 1 steps of warm-up",
        "64 rows (2 per micro-batch, 4 accumulated)",
        "| optimizer steps | 20 of 20 |",
        "| precision | fp32 |",
        "| seed | 42 |",
        "| sequence length | 256 |",
        "| packing | no |",
        "| held-out loss | 3.0000 | 2.0000 |",
        "| held-out perplexity | 20.0850 | 2.0000 |",
        "| held-out accuracy |  | 0.7500 |",
        "8 x A100",
        "cpu: ZeRO 3, optimizer on host, weights on host",
        "| world size | 8 |",
        "3.0 GB accelerator, 800.0 MB host",
        "5.0 GB at its peak",
        "81,743 tokens/s",
        "16 of 80 layers",
        "1,011 tokens/s (median)",
        "| llmtune | 0.0.9 |",
        "| torch | 2.7.1 |",
        "0.12 % at most",
        "(loss.png)",
        "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
    ):
        assert part in text, part
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    front = front_matter(text)
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["base_model_relation"] == "finetune"
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert front["datasets"] == ["HuggingFaceH4/no_robots"]
    assert {"llmtune", "lora", "conversational"} <= set(front["tags"])


def test_the_hubs_own_library_reads_the_metrics(
    run: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    text = write(
        tmp_path / "out",
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=run, output=run / "merged"),
    )
    data: Any = ModelCard(text).data
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "loss": 2.0,
        "perplexity": 2.0,
        "accuracy": 0.75,
    }
    assert results["loss"].dataset_type == "HuggingFaceH4/no_robots"


def test_the_same_inputs_make_the_same_bytes_and_name_no_machine(
    run: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    request = ExportRequest(
        base=base, base_name=str(base), adapter=adapter, run=run, output=run / "merged"
    )
    first = write(tmp_path / "a", request)
    # peft stores the names of modules in the order of a set, which changes from one process to the
    # next.
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_modules"] = settings["target_modules"][::-1]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    shutil.move(run, tmp_path / "moved")
    second = write(
        tmp_path / "b",
        ExportRequest(
            base=base,
            base_name=str(base),
            adapter=adapter,
            run=tmp_path / "moved",
            output=tmp_path / "b",
        ),
    )
    assert first == second
    assert (tmp_path / "a" / "loss.png").read_bytes() == (tmp_path / "b" / "loss.png").read_bytes()
    for trace in (str(tmp_path), str(Path.home()), "Linux-x", os.uname().release):
        assert trace not in first
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", first)
    assert "base_model" not in front_matter(first), "a local folder is nothing that the hub knows"


def test_secrets_are_in_no_card(base: Path, adapter: Path, tmp_path: Path) -> None:
    os.environ["MY_API_TOKEN"] = SECRET
    run = make_run(
        tmp_path / "run",
        f"data.train='s3://me:hunter22@host/{SECRET}/a.jsonl?X-Sig=abc'",
        run_name=f"run {SECRET}",
    )
    # A file of an older version may have been written without care.
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = f"s3://me:hunter22@host/{SECRET}/a.jsonl?X-Sig=abc"
    config["data"]["chat_template"] = SECRET
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = write(
        tmp_path / "out",
        ExportRequest(
            base=base, base_name=f"x-{SECRET}", adapter=adapter, run=run, output=tmp_path / SECRET
        ),
        parity=SECRET,
    )
    for part in (SECRET, "hunter22", "X-Sig", "s3cr3t"):
        assert part not in text
    front_matter(text)


NASTY = 'a | b: *c* #d [e](f) `g` <b>h</b> "i" \n- j: {k}\n---\n## l'


def test_letters_with_a_meaning_do_not_break_the_card(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", run_name=NASTY)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"train": [NASTY.replace("/", ""), "* yes"], "chat_template": NASTY}
    config["model"]["revision"] = NASTY
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = write(
        tmp_path / "out",
        ExportRequest(
            base=base, base_name=NASTY, adapter=adapter, run=run, output=tmp_path / "out"
        ),
        parity=NASTY,
    )
    front = front_matter(text)
    assert NASTY.replace("/", "") in front["model-index"][0]["results"][0]["dataset"]["name"]
    headings = [
        line
        for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n")
        if line.startswith("## ")
    ]
    assert headings == [
        f"## {name}"
        for name in (
            "Load it",
            "Results",
            "Data",
            "Settings",
            "Plan",
            "How it was made",
            "Versions",
            "License",
        )
    ]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, table
    assert "<b>" not in text.partition("\n---\n")[2]


def test_a_checkpoint_is_described_as_of_its_step(
    run: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    checkpoint = run / "checkpoint-10"
    shutil.copytree(adapter, checkpoint)
    text = write(
        tmp_path / "out",
        ExportRequest(
            base=base, base_name="tiny", adapter=checkpoint, run=run, output=tmp_path / "out"
        ),
    )
    assert "| held-out loss | 3.0000 | 2.5000 |" in text
    assert "| optimizer steps | 10 of 20 |" in text
    result = tmp_path / "result"
    shutil.copytree(adapter, result)
    (result / "manifest.json").write_text(json.dumps({"kind": "result", "step": 10, "files": {}}))
    again = write(
        tmp_path / "again",
        ExportRequest(
            base=base, base_name="tiny", adapter=result, run=run, output=tmp_path / "again"
        ),
    )
    assert again == text
    # The best of the steps that were trained.
    best = {"metric": "eval_loss", "value": 2.5, "step": 10}
    about = {"kind": "result", "step": 10, "best": best, "last_step": 16, "files": {}}
    for manifest, chosen in ((about, True), ({**about, "best": None}, False)):
        (result / "manifest.json").write_text(json.dumps(manifest))
        folder = tmp_path / f"chosen-{chosen}"
        text = write(
            folder,
            ExportRequest(base=base, base_name="tiny", adapter=result, run=run, output=folder),
        )
        row = "| chosen | step 10 of the 16 that were trained, with the best eval_loss: 2.5000 |"
        assert (row in text) is chosen


def test_without_a_run_a_card_says_what_is_known(base: Path, adapter: Path, tmp_path: Path) -> None:
    text = write(
        tmp_path / "merged-model",
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "merged-model"
        ),
    )
    assert "# merged-model" in text
    assert "| rank | 4 |" in text
    assert "## Data" not in text
    assert "loss.png" not in text
    assert not (tmp_path / "merged-model" / "loss.png").exists()
    assert "| exported with |" in text
    plain = write(
        tmp_path / "plain",
        ExportRequest(
            base=base, base_name="tiny", adapter=None, run=None, output=tmp_path / "plain"
        ),
    )
    assert "fine-tuned" not in plain
    assert "## Settings" not in plain
    assert front_matter(plain)["tags"] == ["llmtune", "conversational"]


def test_broken_files_of_a_run_are_left_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, data in {
        "plan.json": "[1",
        "config.yaml": "a: [",
        "environment.json": "7",
        "metrics.jsonl": "{}\nx",
    }.items():
        (run / name).write_text(data)
    text = write(
        tmp_path / "out",
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=run, output=tmp_path / "out"
        ),
    )
    front_matter(text)
    assert "## Load it" in text
    # Numbers of another kind than expected do not stop an export either.
    odd = make_run(
        tmp_path / "odd",
        placement={"zero_stage": 9, "optimizer": "?"},
        memory={"device": {"x": 1}},
        data=None,
    )
    assert "## Plan" in write(
        tmp_path / "out2",
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=odd, output=tmp_path / "out2"
        ),
    )


def run_code(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, **replaced: str
) -> str:
    """Run the card's Python where it says; what it printed."""
    (code,) = code_blocks(text, "python")
    for before, after in replaced.items():
        assert before.replace("__", "/") in code
        code = code.replace(before.replace("__", "/"), after)
    monkeypatch.chdir(folder)
    exec(compile(code, "card", "exec"), {})
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("template", [True, False])
def test_the_code_for_transformers_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, template: bool
) -> None:
    if not template:
        for file in base.glob("*.jinja"):
            file.unlink()
    text = write(
        tmp_path / "out",
        ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=tmp_path / "out"),
    )
    assert ("apply_chat_template" in text) == template
    assert ("/v1/chat/completions" in text) == template
    assert run_code(text, tmp_path / "out", monkeypatch, capsys)
    assert "vllm serve . --served-model-name out" in text


def test_a_template_inside_the_tokenizers_configuration_counts(base: Path, tmp_path: Path) -> None:
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    assert "apply_chat_template" in write(
        tmp_path / "out",
        ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=tmp_path / "out"),
    )


@pytest.mark.parametrize("resized", [None, 600])
def test_the_code_for_an_adapter_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, resized: int | None
) -> None:
    targets: dict[str, Any] = {}
    if resized:
        targets = {"target_modules": ["q_proj", "embed_tokens"], "resize_to": resized}
    adapter = make_adapter(base, tmp_path / "adapter", **targets)
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    for file in [*base.glob("tokenizer*"), *base.glob("*.jinja")]:
        shutil.copyfile(file, out / file.name)
    text = write(
        out,
        ExportRequest(base=base, base_name=str(base), adapter=adapter, run=None, output=out),
        format="adapter",
    )
    assert front_matter(text)["library_name"] == "peft"
    assert ("resize_token_embeddings(600)" in text) == (resized is not None)
    assert ("--enable-lora --max-lora-rank 8" in text) == (resized is None)
    run_code(text, out, monkeypatch, capsys, path__to__base=str(base))


def test_the_code_for_one_file_of_weights_gives_the_same_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(base, out)
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = {
        name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    torch.save(tensors, out / "model.pt")
    (out / "model.safetensors").unlink()
    text = write(
        out,
        ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=out),
        format="pt",
    )
    from_card = run_code(text, out, monkeypatch, capsys)
    shutil.copyfile(base / "model.safetensors", out / "model.safetensors")
    plain = write(
        out, ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=out)
    )
    assert run_code(plain, out, monkeypatch, capsys) == from_card


class Traced(torch.nn.Module):
    """Ids and mask in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits."""
        answer = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: torch.Tensor = answer.logits
        return logits


def test_the_code_for_graphs_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(base, out)
    model = Traced(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")).eval()
    tokens = AutoTokenizer.from_pretrained(base)(["Once upon a time"], return_tensors="pt")
    inputs = (tokens["input_ids"], tokens["attention_mask"])
    torch.jit.trace(model, inputs, check_trace=False).save(str(out / "model.ts.pt"))
    expected = AutoTokenizer.from_pretrained(base).decode(model(*inputs)[0, -1].argmax())
    request = ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=out)
    text = write(out, request, format="torchscript")
    assert run_code(text, out, monkeypatch, capsys).removesuffix("\n") == expected
    assert "has no cache" in text


def test_the_code_for_onnx_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A graph that is one table: the logits of a token are its row."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    out = tmp_path / "out"
    shutil.copytree(base, out)
    table = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)).numpy()
    kinds = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "table",
        [onnx.helper.make_tensor_value_info("input_ids", kinds.INT64, ["batch", "sequence"])],
        [onnx.helper.make_tensor_value_info("logits", kinds.FLOAT, ["batch", "sequence", 512])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    versions = {"ir_version": 8, "opset_imports": [onnx.helper.make_opsetid("", 17)]}
    onnx.save(onnx.helper.make_model(graph, **versions), out / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = tokenizer.decode(table[tokenizer("Once upon a time")["input_ids"][-1]].argmax())
    text = write(
        out,
        ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=out),
        format="onnx",
    )
    assert run_code(text, out, monkeypatch, capsys).removesuffix("\n") == expected


def test_a_classifier_is_asked_for_a_label(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    config = LlamaConfig.from_pretrained(
        tiny_model, num_labels=3, id2label={0: "bad", 1: "so", 2: "good"}
    )
    LlamaForSequenceClassification(config).save_pretrained(out)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    text = write(out, ExportRequest(base=out, base_name="tiny", adapter=None, run=None, output=out))
    assert front_matter(text)["pipeline_tag"] == "text-classification"
    assert run_code(text, out, monkeypatch, capsys).split()[0] in ("bad", "so", "good")
    assert "vllm" not in text


def test_a_gguf_file_is_served_by_its_name(
    base: Path, adapter: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-q8_0.gguf").write_bytes(b"GGUF")
    request = ExportRequest(
        base=base, base_name="meta-llama/Llama-3", adapter=adapter, run=run, output=out
    )
    text = write(out, request, format="gguf", gguf_type=GgufType.q8_0)
    for part in (
        "llama-cli -m model-q8_0.gguf -cnv",
        "llama-server -m model-q8_0.gguf",
        'echo "FROM ./model-q8_0.gguf" > Modelfile',
        "ollama create my-run -f Modelfile",
        "a GGUF file in q8_0",
    ):
        assert part in text
    front = front_matter(text)
    assert (front["library_name"], front["base_model_relation"]) == ("gguf", "finetune")
    (out / "Modelfile").write_text("FROM ./model-q8_0.gguf")
    plain = ExportRequest(
        base=base, base_name="meta-llama/Llama-3", adapter=None, run=None, output=out
    )
    text = write(out, plain, format="gguf", gguf_type=GgufType.q4_0)
    assert "echo" not in text
    assert front_matter(text)["base_model_relation"] == "quantized"


@pytest.mark.parametrize("kind", list(FORMATS.list()))
def test_every_format_has_a_card_that_the_hub_reads(
    base: Path, adapter: Path, run: Path, tmp_path: Path, kind: str
) -> None:
    request = ExportRequest(
        base=base, base_name="meta-llama/Llama-3", adapter=adapter, run=run, output=tmp_path / "out"
    )
    text = write(
        tmp_path / "out", request, format=kind, upload="hf://me/my_model@v2", dtype=ExportDtype.fp16
    )
    card: Any = ModelCard(text)
    assert card.data.library_name in ("transformers", "peft", "gguf", "onnx", "pytorch")
    relation = "adapter" if kind == "adapter" else "finetune"
    assert front_matter(text)["base_model_relation"] == relation
    assert "# my_model\n" in text
    whole = ("safetensors", "adapter", "bnb_4bit")
    assert ("hf download me/my_model --local-dir my_model" in text) == (kind not in whole)
    assert ('"me/my_model"' in text) == (kind in whole)
    for code in code_blocks(text, "python"):
        compile(code, "card", "exec")
    assert ("stored in fp16" in text) == (kind in ("safetensors", "pt"))


def test_a_card_says_onto_which_base_a_qlora_adapter_was_merged(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["tuner"]["kind"] = "qlora"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    request = ExportRequest(
        base=base, base_name="tiny", adapter=adapter, run=run, output=tmp_path / "x"
    )
    original = write(tmp_path / "a", request)
    assert "was added to the unquantized base (`export.merge_onto=original`)" in original
    assert "qlora" in front_matter(original)["tags"]
    nf4 = write(tmp_path / "b", request, merge_onto=MergeOnto.nf4)
    assert "quantized to NF4 and back (`export.merge_onto=nf4`)" in nf4
    alone = write(tmp_path / "c", request, format="adapter")
    assert "BitsAndBytesConfig(load_in_4bit=True" in alone
    lora = write(
        tmp_path / "d",
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "x"
        ),
    )
    assert "rounded once" in lora
    assert "NF4" not in lora


@pytest.mark.parametrize(
    ("files", "expected", "shown"),
    [
        (
            {"README.md": "---\nlicense: apache-2.0\n---\n"},
            {"license": "apache-2.0"},
            "applies: apache-2.0",
        ),
        (
            {
                "README.md": (
                    "---\nlicense: other\nlicense_name: 'x: y'\nlicense_link: LICENSE\n---\n"
                ),
                "LICENSE": "Text",
            },
            {"license": "other", "license_name": "x: y", "license_link": "LICENSE"},
            "applies: x: y. Its text is beside this file: LICENSE",
        ),
        ({"LICENSE": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT"}, {"license": "llama3"}, "llama3"),
        (
            {"LICENSE.txt": "Apache License\n   Version 2.0, January"},
            {"license": "apache-2.0"},
            "LICENSE.txt",
        ),
        ({"README.md": "---\nlicense: [\n---\n"}, {}, "look it up"),
        ({}, {}, "look it up"),
    ],
)
def test_the_license_is_the_bases(
    base: Path, tmp_path: Path, files: dict[str, str], expected: dict[str, str], shown: str
) -> None:
    for name, data in files.items():
        (base / name).write_text(data)
    out = tmp_path / "out"
    out.mkdir()
    text = write(
        out, ExportRequest(base=base, base_name="tiny", adapter=None, run=None, output=out)
    )
    assert {
        key: value for key, value in front_matter(text).items() if key.startswith("license")
    } == expected
    assert shown in text
    assert {file.name for file in out.iterdir()} == {"README.md", *(files.keys() - {"README.md"})}


def test_a_wholly_trained_model_has_the_license_of_what_it_was_trained_from(
    base: Path, run: Path, tmp_path: Path
) -> None:
    (run / "base").mkdir()
    (run / "base" / "LICENSE").write_text("MIT License")
    trained = run / "model"
    shutil.copytree(base, trained)
    text = write(
        tmp_path / "out",
        ExportRequest(
            base=trained, base_name="some/base", adapter=None, run=run, output=tmp_path / "out"
        ),
    )
    assert front_matter(text)["license"] == "mit"
    assert front_matter(text)["base_model_relation"] == "finetune"
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT License"


@pytest.mark.process
def test_a_real_run_has_every_part(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["data.train=stdlib_docs@60", "data.val_set_size=8", "train.max_steps=3", "export=none"]
    done = run_cli(*TINY, *small, f"output_dir={run}")
    assert done.code == 0, done.err
    base = Path(json.loads((run / "plan.json").read_text())["model_folder"])
    text = write(
        tmp_path / "out",
        ExportRequest(
            base=base, base_name="random", adapter=run / "adapter", run=run, output=run / "merged"
        ),
    )
    for title in (
        "Load it",
        "Results",
        "Data",
        "Settings",
        "Plan",
        "How it was made",
        "Versions",
        "License",
    ):
        assert f"\n## {title}\n" in text
    for part in (
        "stdlib_docs@60",
        "| optimizer steps | 3 of 3 |",
        "measured speed",
        "predicted memory",
        "held-out loss",
    ):
        assert part in text
    assert str(tmp_path) not in text
    data: Any = ModelCard(text).data
    assert len(data.eval_results) == 3
