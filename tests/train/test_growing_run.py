"""The numbers of real runs whose batch grows, against a loop that shares no code with them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtune.config.cache_folder import open_cache
from llmtune.config.compose import compose_config
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import TrainLoader
from llmtune.data.prepared_data import open_rows
from llmtune.model.source import resolve_model_folder
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.prepared_data import PreparedData
from llmtune.storage.plain_fields import from_plain
from tests.support import TINY, first, run_cli
from tests.train import plain_loop
from tests.train.test_plain_loop import TOLERANCE, check_weights, conversations

RATE, CLIP, ROWS = 2e-3, 0.3, 23
#: Two epochs: 2 + 2 + 2, 4 + 4, 8 + 8 + 8 + 8 rows.
BY_STEPS = ("steps", [[0, 2], [3, 4], [5, 8]])
BY_TOKENS = ("tokens", [[0, 2], [300, 4], [800, 8]])

#: Unit and schedule, learning rate, ZeRO stage, ranks, micro-batch.
CELLS: list[tuple[Any, ...]] = [
    (BY_STEPS, "linear", 1, 2, 1),
    (BY_TOKENS, "sqrt", 3, 2, 1),
]
OTHERS = [
    (BY_STEPS, "none", 0, 1, 2),
    *(
        cell
        for cell in itertools.product(
            (BY_STEPS, BY_TOKENS), ("none", "linear", "sqrt"), (0, 1, 2, 3), (1, 2), (1,)
        )
        if cell not in CELLS
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    for name, count, seed in (("train", ROWS, 1), ("eval", 7, 2)):
        lines = (json.dumps({"messages": row}) for row in conversations(count, seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def overrides_of(cell: tuple[Any, ...], folder: Path) -> list[str]:
    (unit, schedule), scaling, stage, ranks, micro = cell
    return [
        *TINY,
        *("tuner=full", "precision=fp32", f"zero={stage}", f"launch.nproc={ranks}"),
        f"train.batch_schedule={json.dumps(schedule)}",
        f"train.batch_schedule_unit={unit}",
        f"train.batch_schedule_lr={scaling}",
        f"train.per_device_train_batch_size={micro}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'eval.jsonl'}",
        "train.num_train_epochs=2",
        f"optim.learning_rate={RATE}",
        *("schedule.warmup_steps=2", "schedule=cosine", f"train.max_grad_norm={CLIP}"),
        *("optim.weight_decay=0.1", "export=none"),
    ]


def documents_in_order(run: Path, documents: list[plain_loop.Document]) -> list[Any]:
    """The documents of both epochs one by one: the one thing that only the run can say."""
    plan = json.loads((run / "plan.json").read_text())
    rows = open_rows(from_plain(PreparedData, plan["data"]), "train")
    batch = BatchPlan(global_batch_size=1, micro_batch_size=1, accumulation_steps=1, world_size=1)
    seed = int(yaml.safe_load((run / "config.yaml").read_text())["seed"])
    loader = TrainLoader(rows, batch, 0, seed, Collator(pad_token_id=0))
    numbers = loader.row_numbers(0, 2 * ROWS)
    return [documents[line - 1] for row in numbers for _, line in rows.locations(row)]


def cut(unit: str, schedule: list[list[int]], documents: list[Any]) -> tuple[list[Any], list[int]]:
    """Batches cut off one by one, and the size that each was to have."""
    steps: list[Any] = []
    sizes: list[int] = []
    while documents:
        tokens = sum(len(document.ids) for step in steps for document in step)
        done = {"steps": len(steps), "tokens": tokens}[unit]
        sizes.append([size for start, size in schedule if start <= done][-1])
        steps.append(documents[: sizes[-1]])
        documents = documents[sizes[-1] :]
    return steps, sizes


def check(cell: tuple[Any, ...], folder: Path, run: Path) -> None:
    (unit, schedule), scaling, *_ = cell
    done = run_cli(*overrides_of(cell, folder), f"output_dir={run}")
    assert done.code == 0, done.err

    config = compose_config(["model=tiny"]).config
    base = resolve_model_folder(config.model, open_cache(config.paths), print)
    tokenizer = plain_loop.load_tokenizer(base)
    train, held_out = (
        [
            plain_loop.encode(json.loads(line)["messages"], tokenizer)
            for line in (folder / name).open()
        ]
        for name in ("train.jsonl", "eval.jsonl")
    )
    steps, sizes = cut(unit, schedule, documents_in_order(run, train))
    assert set(sizes) == {2, 4, 8}
    change = {"none": lambda _: 1.0, "linear": float, "sqrt": math.sqrt}[scaling]
    found = plain_loop.train(
        plain_loop.Recipe(
            base=base,
            adapter=None,
            steps=steps,
            held_out=held_out,
            learning_rate=RATE,
            kind="cosine",
            warmup_steps=2,
            weight_decay=0.1,
            max_grad_norm=CLIP,
            peaks=[change(size / 2) for size in sizes],
        )
    )

    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    lines = [record for record in records if "loss" in record]
    assert [line["batch_size"] for line in lines] == sizes
    assert [line["loss"] for line in lines] == pytest.approx(found.losses, rel=TOLERANCE)
    assert [line["grad_norm"] for line in lines] == pytest.approx(found.norms, rel=TOLERANCE)
    assert [line["learning_rate"] for line in lines] == pytest.approx(found.rates, rel=1e-9)
    assert [line["tokens"] for line in lines] == [
        sum(len(document.ids) for document in step) for step in steps
    ]
    evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert evaluations == pytest.approx(found.eval_losses, rel=TOLERANCE)
    check_weights(run, found, {})


@pytest.mark.process
@pytest.mark.parametrize("cell", first(1, CELLS[::-1]), ids=str)
def test_a_run_that_grows_is_what_plain_pytorch_computes(
    cell: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    check(cell, folder, tmp_path / "run")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("cell", OTHERS, ids=str)
def test_every_other_run_that_grows_is_what_plain_pytorch_computes(
    cell: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    check(cell, folder, tmp_path / "run")


@pytest.mark.process
@pytest.mark.parametrize("growth", first(1, [BY_TOKENS, BY_STEPS]), ids=["tokens", "steps"])
def test_epochs_of_a_run_that_grows_end_at_the_step_with_their_last_row(
    growth: Any, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = overrides_of((growth, "none", 0, 1, 2), folder)
    overrides += ["train.eval_strategy=epoch", "train.save_strategy=epoch"]
    done = run_cli(*overrides, "train.save_total_limit=null", f"output_dir={run}")
    assert done.code == 0, done.err

    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    rows = list(itertools.accumulate(line["batch_size"] for line in records if "loss" in line))
    end = next(step for step, seen in enumerate(rows, start=1) if seen >= ROWS)
    if growth == BY_STEPS:
        # 2 + 2 + 2, 4 + 4, 8 are 22 rows.
        assert (end, len(rows)) == (7, 9)
    assert [line["step"] for line in records if "eval_loss" in line] == [0, end, len(rows)]
    saved = sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    assert saved == [end, len(rows)]
    state = json.loads((run / f"checkpoint-{end}" / "trainer_state.json").read_text())
    assert state["data_position"]["next_row"] == rows[end - 1]
    assert "evaluations" in done.out
    assert "every epoch (1 before the end)" in done.out


@pytest.mark.process
def test_a_schedule_may_change_where_the_run_has_not_been(folder: Path, tmp_path: Path) -> None:
    """Stopped after four steps: the size that began at three steps has been, that of five has
    not.
    """
    run = tmp_path / "run"
    cell = (BY_STEPS, "linear", 0, 1, 1)
    base = [*overrides_of(cell, folder), f"output_dir={run}"]

    def start(*more: str) -> Any:
        return run_cli(*base, *more)

    assert start("train.max_steps=4").code == 0
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["data_position"]["next_row"] == 2 + 2 + 2 + 4
    for refused in (
        "train.batch_schedule=[[0,2],[2,4],[5,8]]",
        "train.batch_schedule=[[0,2]]",
        "train.batch_schedule=null",
        "train.batch_schedule_lr=none",
        "train.batch_schedule_unit=tokens",
    ):
        done = start(refused, "train.max_steps=7")
        assert done.code == 5, (refused, done.err)
        assert "was trained with other batches than train.batch_schedule gives now" in done.err
    done = start("train.batch_schedule=[[0,2],[3,4],[6,16]]", "train.max_steps=7")
    assert done.code == 0, done.err
    assert "changed since the last start: train.batch_schedule: " in done.out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [line["batch_size"] for line in lines if "loss" in line] == [2, 2, 2, 4, 4, 4, 16]
