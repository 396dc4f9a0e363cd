"""Losses and metrics of every task are those of plain PyTorch, transformers and scikit-learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import TrainLoader
from llmtune.data.prepared_data import open_rows
from llmtune.plan.run_record import RunRecord
from tests.support import product, run_cli
from tests.task.plain import PlainJob

LENGTH, STEPS, SIZE, RATE = 24, 20, 8, 1e-3
WORDS = ("str", "int", "dict", "list", "return", "value", "object", "key", "open", "file", "print")

BASE = [
    f"data.max_seq_length={LENGTH}",
    "data.overlong=truncate",
    "data.max_overlong_share=1.0",
    "precision=fp32",
    "tuner=full",
    f"train.max_steps={STEPS}",
    f"train.global_batch_size={SIZE}",
    "train.eval_steps=10",
    f"optim.learning_rate={RATE}",
    "optim.weight_decay=0",
    "optim.betas=[0.9,0.999]",
    "optim.eps=1e-8",
    "schedule=constant",
    "schedule.warmup_ratio=0",
    "export=none",
    "+model.config.hidden_dropout_prob=0.0",
    "+model.config.attention_probs_dropout_prob=0.0",
]


def sentence(draw: random.Random, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, most)))


def one_row(kind: str, draw: random.Random) -> dict[str, Any]:
    text = sentence(draw, 20)
    if kind == "single":
        return {"text": text, "label": "xyz"[len(text) % 3]}
    if kind == "several":
        return {"text": text, "label": [name for name in "xyz" if draw.random() < 0.5]}
    if kind == "number":
        return {"text": text, "label": len(text) / 40 + draw.random()}
    if kind == "pair":
        return {"sentence1": text, "sentence2": sentence(draw, 30), "label": draw.randint(0, 2)}
    words = [draw.choice([*WORDS, "dictionary"]) for _ in range(draw.randint(2, 30))]
    tags = [draw.choice(["O", "O", "B-LOC", "I-LOC", "B-PER"]) for _ in words]
    return {"tokens": words, "tags": tags}


def write_rows(kind: str, folder: Path) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    draw = random.Random(kind)
    train, held_out = ([one_row(kind, draw) for _ in range(n)] for n in (90, 37))
    for name, rows in (("train", train), ("eval", held_out)):
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder / "train.jsonl", train, held_out


KINDS = ("single", "several", "number", "pair", "tags")
CLASSES = {"tags": "AutoModelForTokenClassification"}


def check(kind: str, model: str, stage: int, ranks: int, folder: Path) -> None:
    file, rows, held_out = write_rows(kind, folder)
    run = folder / "run"
    done = run_cli(
        f"model={model}",
        f"data.train={file}",
        f"data.eval={folder / 'eval.jsonl'}",
        f"zero={stage}",
        f"launch.nproc={ranks}",
        f"output_dir={run}",
        *BASE,
    )
    assert done.code == 0, done.out + done.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]

    # The same rows in plain PyTorch; only their order is asked of llmtune.
    record = RunRecord.from_json((run / "plan.json").read_text())
    assert record.data is not None
    assert record.model_folder is not None
    assert record.batch is not None
    prepared = open_rows(record.data, "train")
    loader = TrainLoader(prepared, record.batch, 0, 42, Collator(pad_token_id=0))
    steps = [
        [rows[prepared.location(number)[1] - 1] for number in loader.row_numbers(first)]
        for first in range(0, STEPS * SIZE, SIZE)
    ]
    plain = PlainJob(
        record.model_folder, CLASSES.get(kind, "AutoModelForSequenceClassification"), LENGTH
    )
    before = plain.scores(held_out)
    assert losses == pytest.approx(plain.train(steps, RATE), abs=1e-5)
    assert losses[-1] != pytest.approx(losses[0], abs=1e-3), "the model must learn"
    for expected, found in ((before, evaluations[0]), (plain.scores(held_out), evaluations[-1])):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, abs=TOLERANCE.get(key, 1e-5)), key


#: These go by the order of logits, or by differences of nearly equal ones, which a rounding can
#: change. That they are scikit-learn's on the same logits is in ``tests/metrics/``.
TOLERANCE = {"eval_auroc": 5e-3, "eval_spearman": 2e-2, "eval_pearson": 1e-3}

#: Each task, stage and number of ranks at least once.
CELLS = list(zip(KINDS, (0, 3, 1, 2, 3), (1, 2, 2, 1, 1), strict=True))


@pytest.mark.process
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_a_task_trains_as_plain_pytorch_does(cell: tuple[str, int, int], tmp_path: Path) -> None:
    kind, stage, ranks = cell
    check(kind, "tiny_roberta", stage, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    "cell", product(KINDS, (0, 1, 2, 3), (1, 2), ("tiny_roberta", "tiny_bert"))
)
def test_every_stage_and_number_of_ranks_does(
    cell: tuple[str, int, int, str], tmp_path: Path
) -> None:
    kind, stage, ranks, model = cell
    check(kind, model, stage, ranks, tmp_path)
