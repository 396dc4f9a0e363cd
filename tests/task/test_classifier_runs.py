"""Whole runs of classifiers: what is published is what plain transformers and peft compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmtune.plan.run_record import RunRecord
from tests.support import Finished, first, run_cli

TEXTS = ["a good film", "bad", "the story was of a poor film and the end was bad", "nice nice"]
BASE = [
    "data.max_seq_length=32",
    "data.overlong=truncate",
    "precision=fp32",
    "train.max_steps=4",
    "train.global_batch_size=8",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = {"pos": ("good", "nice"), "neg": ("bad", "poor"), "néutral": ("a", "the")}
    lines = [
        json.dumps({"text": f"{word} film {n}", "label": label}, ensure_ascii=False)
        for n in range(12)
        for label, known in words.items()
        for word in known
    ]
    file.write_text("\n".join(lines))
    return file


def train(rows: Path, run: Path, *overrides: str) -> Finished:
    done = run_cli("model=tiny", f"data.train={rows}", f"output_dir={run}", *BASE, *overrides)
    assert done.code == 0, done.out + done.err
    return done


def logits_of(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**batch).logits
    return logits


@pytest.mark.process
def test_a_decoder_with_lora_under_zero_3_merges_into_what_peft_computes(
    rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(rows, run, "tuner=lora", "zero=3", "launch.nproc=2", "export.dtype=fp32")
    merged: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "merged", dtype=torch.float32
    )
    assert merged.config.id2label == {0: "neg", 1: "néutral", 2: "pos"}
    found = logits_of(merged, run / "merged")

    # The base has another head: peft takes the trained one out of the adapter.
    from peft import PeftModel

    record = RunRecord.from_json((run / "plan.json").read_text())
    assert record.model_folder is not None
    torch.manual_seed(5)
    base: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        record.model_folder, dtype=torch.float32
    )
    with torch.no_grad():
        base.score.weight.normal_()
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    adapted = PeftModel.from_pretrained(base, str(run / "adapter"))
    assert torch.allclose(found, logits_of(adapted, run / "merged"), atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(found, logits_of(adapted, run / "merged"), atol=1e-3)

    # The same without a cache of the model with its head.
    again = run_cli("eval", f"run={run}", "--json", env={"LLMTUNE_CACHE": str(tmp_path / "empty")})
    assert again.code == 0, again.out + again.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_loss" in line][-1]
    values = json.loads(again.out)
    for key in ("eval_loss", "eval_accuracy", "eval_f1"):
        assert values[key] == pytest.approx(last[key], abs=1e-5), key

    # It says which of its own models can write text.
    chat = run_cli("chat", f"run={run}", "chat.prompt=hello")
    assert chat.code == 2
    assert "trained for sequence classification" in chat.err
    assert (run / "confusion_matrix.png").stat().st_size > 1000
    table = json.loads((run / "confusion_matrix.json").read_text())
    card = (run / "merged" / "README.md").read_text()
    assert "| néutral |" in card
    assert (run / "merged" / "confusion_matrix.png").is_file()
    assert sum(map(sum, table["counts"])) == values["rows"]


@pytest.mark.process
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(("model=tiny_bert",), marks=pytest.mark.slow),
        ("model=tiny_roberta",),
        pytest.param(
            ("model=tiny", "+model.config.tie_word_embeddings=false"), marks=pytest.mark.slow
        ),
    ],
    ids=["bert", "roberta", "untied llama"],
)
def test_the_head_that_the_base_had_before_is_left_out_of_what_is_merged(
    model: tuple[str, ...], rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(rows, run, *model, "tuner=lora", "export.dtype=fp32")
    loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "merged", dtype=torch.float32, output_loading_info=True
    )
    merged, info = loaded
    assert not any(info.values()), info

    from peft import PeftModel

    record = RunRecord.from_json((run / "plan.json").read_text())
    assert record.model_folder is not None
    base: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        record.model_folder, dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(base, str(run / "adapter"))
    expected = logits_of(adapted, run / "merged")
    assert torch.allclose(logits_of(merged, run / "merged"), expected, atol=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("form", first(1, ["torchscript", "onnx", "pt"]))
def test_a_graph_of_a_classifier_computes_what_the_model_does(
    form: str, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(rows, run, "tuner=full", f"export={form}")
    folder = run / f"export-{form}"
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "model", dtype=torch.float32
    )
    expected = logits_of(model, run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = (batch["input_ids"], batch["attention_mask"])
    found: Any
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        names = [given.name for given in session.get_inputs()]
        found = torch.tensor(session.run(None, {name: batch[name].numpy() for name in names})[0])
    elif form == "torchscript":
        found = torch.jit.load(folder / "model.ts.pt")(*inputs)
    else:
        weights = torch.load(folder / "model.pt", weights_only=True)
        fresh: Any = transformers.AutoModelForSequenceClassification.from_config(model.config)
        fresh.load_state_dict(weights)
        found = logits_of(fresh, folder)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.process
def test_rows_of_another_task_are_refused_before_a_rank_starts(rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ["model=tiny", f"data.train={rows}", f"output_dir={run}", *BASE]
    wrong = run_cli(*given, "model.task=causal_lm")
    assert wrong.code == 2
    assert "model.task=causal_lm" in wrong.err
    assert "have classes as labels; take model.task=sequence_classification" in wrong.err
    unknown = run_cli(*given, "model.task=sequence_clasification")
    assert unknown.code == 2
    assert "did you mean sequence_classification?" in unknown.err
    weights = run_cli(*given, "data.class_weights=[1,2]")
    assert weights.code == 2
    assert "a list of 3 numbers above 0, for neg, néutral, pos" in weights.err
    packed = run_cli(*given, "data.packing=true")
    assert packed.code == 2
    assert "cannot share a row" in packed.err
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.process
@pytest.mark.parametrize("kind", first(1, ["bert", "llama"]))
def test_the_head_is_trained_with_the_last_layer_and_the_rest_stays_bit_by_bit(
    kind: str, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(
        rows,
        run,
        f"model.config.model_type={kind}",
        *("tuner=freeze", "tuner.freeze.last_layers=1", "zero=3", "launch.nproc=2"),
        *("optim.learning_rate=1e-2", "export.dtype=fp32"),
    )
    record = RunRecord.from_json((run / "plan.json").read_text())
    assert record.model_folder is not None
    before: dict[str, torch.Tensor] = {}
    for file in record.model_folder.glob("*.safetensors"):
        before.update(load_file(file))
    after = load_file(run / "model/model.safetensors")
    last = {
        "llama": ("model.layers.1.", "model.norm.", "score."),
        "bert": ("bert.encoder.layer.1.", "bert.pooler.", "classifier."),
    }[kind]
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) != name.startswith(last), name
    # The head is planned for the task's usual labels, and not for those of the rows.
    body = [name for name in after if name.startswith(last[:-1])]
    assert record.shape is not None
    planned = record.shape.trainable_parameters - record.shape.head_parameters
    assert planned == sum(after[name].numel() for name in body)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert logits_of(model, run / "model").shape == (len(TEXTS), 3)
