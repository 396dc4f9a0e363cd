"""A task from outside: the tiny job trains by its loss, and everything else is as it says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support import ROOT, run_cli

ENV = {
    "LLMTUNE_PLUGINS": "tests.extend.smoothed_classes",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}


@pytest.mark.process
@pytest.mark.slow
def test_a_task_of_a_plugin_trains_and_chooses_the_best_by_its_metric(tmp_path: Path) -> None:
    words = {"pos": ("good", "nice"), "neg": ("bad", "poor")}
    rows = [
        {"text": f"{word} film {n}", "label": label}
        for n in range(15)
        for label, known in words.items()
        for word in known
    ]
    file, run = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("\n".join(map(json.dumps, rows)))
    job = (
        *("model=tiny", f"data.train={file}", f"output_dir={run}", "data.max_seq_length=32"),
        *("train.max_steps=4", "train.eval_steps=2", "train.global_batch_size=8", "zero=3"),
        *("precision=fp32", "tuner=full", "export=none"),
    )
    done = run_cli(*job, "model.task=smoothed_classes", env=ENV)
    assert done.code == 0, done.out + done.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "eval_loss" in line)
    assert "eval_f1" in first
    finished = json.loads((run / "finished.json").read_text())
    assert finished["best"]["metric"] == "eval_loss"

    # The loss is the plug-in's: that of sure labels is another.
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    with torch.no_grad():
        logits = model(**tokenizer(["good film 3"], return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    plain = run_cli(*job, "model.task=sequence_classification", f"output_dir={tmp_path / 'p'}")
    assert plain.code == 0, plain.out + plain.err
    others = [json.loads(line) for line in (tmp_path / "p/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses != pytest.approx([line["loss"] for line in others if "loss" in line], abs=1e-4)

    # Without the plug-in the name is unknown.
    unknown = run_cli(*job, "model.task=smoothed_classes")
    assert unknown.code == 2
    assert "model.task=smoothed_classes" in unknown.err
