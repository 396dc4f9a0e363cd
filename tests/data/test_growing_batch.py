"""Global batches that grow: every row once, the same on all ranks, wherever a run goes on."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig
from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import BatchScheduleUnit, TrainConfig
from llmtune.data.load.collate import Collator
from llmtune.data.load.count_steps import count_in_steps
from llmtune.data.load.loader import LoaderSettings, StepBatch, TrainLoader
from llmtune.data.load.streaming import RowStream, StreamLoader
from llmtune.data.store.packing import pack_rows
from llmtune.data.store.token_store import Rows
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.length.batch_schedule import BatchSchedule, Reached, ScheduledBatch
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.steps import StepsPlan, evaluation_interval, save_interval
from llmtune.storage.plain_fields import from_plain
from tests.data.stores import make_rows

PAD = 0
ROWS = 53
STEPS, TOKENS = BatchScheduleUnit.steps, BatchScheduleUnit.tokens


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Of one to nine tokens, the first of which tells which row it is."""
    lengths = random.Random(5)
    return make_rows(
        tmp_path_factory.mktemp("rows"), [[n + 1] * lengths.randint(2, 9) for n in range(ROWS)]
    )


def scheduled(
    unit: BatchScheduleUnit, world: int = 1, seed: int | None = None, micro: int = 1
) -> ScheduledBatch:
    """A schedule, a drawn one where a seed is given, whose sizes divide among the ranks."""
    entries = [(0, 4), (3, 8), (5, 16)] if unit is STEPS else [(0, 4), (40, 8), (150, 16)]
    if seed is not None:
        draws = random.Random(seed)
        starts = sorted(draws.sample(range(1, 12 if unit is STEPS else 300), 3))
        sizes = sorted(draws.sample(range(1, 7), 4))
        entries = list(zip([0, *starts], [size * 4 for size in sizes], strict=True))
    first = entries[0][1]
    plan = BatchPlan(
        global_batch_size=first,
        micro_batch_size=micro,
        accumulation_steps=first // micro // world,
        world_size=world,
    )
    return ScheduledBatch(plan, BatchSchedule(tuple(entries), unit))


def loader(data: Rows, batch: ScheduledBatch, rank: int = 0, **more: Any) -> TrainLoader:
    return TrainLoader(data, batch, rank, 42, Collator(pad_token_id=PAD), **more)


def numbers(batch: StepBatch) -> list[int]:
    return sorted(row for micro in batch.rows for row in micro if row is not None)


def plain_batches(data: Rows, batch: ScheduledBatch, total: int) -> list[list[int]]:
    """What a list of rows in order, cut off one batch after the other, gives."""
    one = loader(data, batch, last_row=total)
    left = one.row_numbers(0, total)
    batches: list[list[int]] = []
    while left:
        done = len(batches)
        if batch.schedule.unit is TOKENS:
            done = int(sum(data.lengths[row] for taken in batches for row in taken))
        size = next(size for start, size in reversed(batch.schedule.entries) if start <= done)
        batches.append(left[:size])
        left = left[size:]
    return batches


@pytest.mark.parametrize("unit", BatchScheduleUnit)
@pytest.mark.parametrize("seed", [None, *range(12)])
@pytest.mark.parametrize("epochs", [1, 2.3])
def test_epochs_end_with_the_last_row_and_every_batch_is_as_large_as_scheduled(
    unit: BatchScheduleUnit, seed: int | None, epochs: float, rows: Rows
) -> None:
    total, batch = round(epochs * ROWS), scheduled(unit, seed=seed)
    expected = plain_batches(rows, batch, total)
    in_steps = count_in_steps(rows, batch, TrainConfig(num_train_epochs=epochs), 42)
    count = in_steps.count_steps(total)
    assert count == len(expected)
    if unit is STEPS:
        assert batch.schedule.count_steps(total) == count
    found = list(loader(rows, batch, last_row=total).from_position(None, count))
    assert [numbers(step) for step in found] == [sorted(step) for step in expected]
    assert found[-1].position["next_row"] == total
    assert [step.tokens for step in found] == [
        int(sum(rows.lengths[row] for row in step)) for step in expected
    ]
    assert sum(step.loss_weight for step in found[:-1]) > 0


@pytest.mark.parametrize("unit", BatchScheduleUnit)
@pytest.mark.parametrize("seed", [None, *range(12)])
@pytest.mark.parametrize("length", [{"num_train_epochs": 3}, {"max_steps": 11}, {"max_steps": 40}])
def test_an_epoch_ends_with_the_step_that_has_its_last_row(
    unit: BatchScheduleUnit, seed: int | None, length: dict[str, Any], rows: Rows
) -> None:
    batch = scheduled(unit, seed=seed)
    train = TrainConfig(
        batch_schedule=[list(entry) for entry in batch.schedule.entries],
        batch_schedule_unit=unit,
        eval_strategy="epoch",
        save_strategy="epoch",
        **length,
    )
    in_steps = count_in_steps(rows, batch, train, 42)
    first = batch.first.global_batch_size
    plan = resolve_steps(train, ScheduleConfig(), ROWS, first, in_steps)
    plan = from_plain(StepsPlan, json.loads(json.dumps(asdict(plan))))

    steps = loader(rows, batch, last_row=plan.total_rows).from_position(None, plan.total_steps)
    reached = [0, *(int(step.position["next_row"]) for step in steps)]
    assert [plan.rows_until(step) for step in range(plan.total_steps)] == reached[:-1]
    epochs = [row // ROWS for row in reached]
    expected = [step for step in range(1, plan.total_steps) if epochs[step] > epochs[step - 1]]
    assert expected or plan.total_steps == 11
    for interval in (evaluation_interval(train, plan), save_interval(train, plan)):
        due = [step for step in range(1, 2 * plan.total_steps) if interval.is_due(step)]
        assert due == expected
        for after in range(plan.total_steps):
            assert interval.count(after) == len([step for step in expected if step > after])


@pytest.mark.parametrize("unit", BatchScheduleUnit)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_ranks_share_the_batch_with_as_many_micro_batches_each(
    unit: BatchScheduleUnit, world: int, rows: Rows
) -> None:
    total = 2 * ROWS
    whole = plain_batches(rows, scheduled(unit), total)
    for micro in (1, 2) if world == 2 else (1,):
        batch = scheduled(unit, world, micro=micro)
        ranks = [
            list(loader(rows, batch, rank, last_row=total).from_position(None, len(whole)))
            for rank in range(world)
        ]
        for step, expected in enumerate(whole):
            shares = [ranks[rank][step] for rank in range(world)]
            assert sorted(row for share in shares for row in numbers(share)) == sorted(expected)
            counts = {len(share.micro_batches) for share in shares}
            assert len(counts) == 1
            if len(expected) in (4, 8, 16):
                assert counts == {len(expected) // micro // world}
            sizes = {len(one.input_ids) for share in shares for one in share.micro_batches}
            assert sizes == {micro}
            assert len({share.tokens for share in shares}) == 1


@pytest.mark.parametrize("unit", BatchScheduleUnit)
def test_a_resumed_run_has_the_batches_of_the_undisturbed_one(
    unit: BatchScheduleUnit, rows: Rows
) -> None:
    batch = scheduled(unit)
    steps = 14
    undisturbed = list(loader(rows, batch).from_position(None, steps))
    assert len({sum(map(len, step.rows)) for step in undisturbed}) == 3
    for cut in range(1, steps):
        before = undisturbed[:cut]
        reached = Reached(cut, sum(step.tokens for step in before))
        position = json.loads(json.dumps(before[-1].position))
        for world in (1, 2):
            again = [
                list(
                    loader(rows, scheduled(unit, world), rank).from_position(
                        position, steps - cut, reached
                    )
                )
                for rank in range(world)
            ]
            for number, step in enumerate(undisturbed[cut:]):
                shares = [share[number] for share in again]
                assert sorted(row for share in shares for row in numbers(share)) == numbers(step)
                assert all(share.position == step.position for share in shares)


def test_tokens_of_packed_rows_count_too(rows: Rows) -> None:
    members, starts = pack_rows(rows.documents("lengths"), 18, 0)
    packed = Rows(rows.stores, members, starts)
    batch = scheduled(TOKENS)
    total = 4 * len(packed)
    expected = plain_batches(packed, batch, total)
    found = list(loader(packed, batch, last_row=total).from_position(None, len(expected)))
    assert [numbers(step) for step in found] == [sorted(step) for step in expected]
    assert {len(step) for step in expected[:-1]} == {4, 8, 16}


@pytest.mark.process
@pytest.mark.parametrize("unit", BatchScheduleUnit)
def test_worker_processes_make_the_same_batches(unit: BatchScheduleUnit, rows: Rows) -> None:
    batch = scheduled(unit)
    alone = list(loader(rows, batch).from_position(None, 9))
    settings = LoaderSettings(workers=2)
    helped = list(loader(rows, batch, settings=settings).from_position(None, 9))
    assert [step.rows for step in helped] == [step.rows for step in alone]
    assert [step.position for step in helped] == [step.position for step in alone]


@pytest.mark.parametrize("unit", BatchScheduleUnit)
def test_a_stream_grows_in_the_same_way(
    unit: BatchScheduleUnit, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.data.read.readers.BLOCK_BYTES", 400)
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{n}:", "completion": "x" * (n % 7 + 1)} for n in range(90)]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = DataConfig(train=str(file), streaming=True, shuffle_buffer=30, max_seq_length=64)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)

    def stream(world: int = 1, rank: int = 0) -> StreamLoader:
        return StreamLoader(
            RowStream(config, tokenizer, 42),
            scheduled(unit, world),
            rank,
            Collator(pad_token_id=2),
            LoaderSettings(),
        )

    steps = 10
    undisturbed = list(stream().from_position(None, steps))
    sizes = [len(step.micro_batches) for step in undisturbed]
    schedule = scheduled(unit).schedule
    tokens = [0, *itertools.accumulate(step.tokens for step in undisturbed)]
    assert sizes == [schedule.rows_at(Reached(n, tokens[n])) for n in range(steps)]
    assert set(sizes) == {4, 8, 16}
    for cut in (1, 3, 4, 7):
        position = json.loads(json.dumps(undisturbed[cut - 1].position))
        again = list(stream().from_position(position, steps - cut, Reached(cut, tokens[cut])))
        assert [step.position for step in again] == [step.position for step in undisturbed[cut:]]
        for one, other in zip(again, undisturbed[cut:], strict=True):
            pairs = zip(one.micro_batches, other.micro_batches, strict=True)
            assert all(a.input_ids.tolist() == b.input_ids.tolist() for a, b in pairs)
    half = [list(stream(2, rank).from_position(None, steps)) for rank in range(2)]
    for number, step in enumerate(undisturbed):
        assert {len(share[number].micro_batches) * 2 for share in half} == {sizes[number]}
        assert all(share[number].tokens == step.tokens for share in half)
