"""Batches: the same rows for any number of ranks, padding that trains nothing, each row once an
epoch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import LoaderSettings, TrainLoader, iterate_eval
from llmtune.data.store.packing import pack_rows
from llmtune.data.store.token_store import Rows
from llmtune.errors import CheckpointError
from llmtune.plan.batch_sizes import BatchPlan
from tests.data.stores import make_rows
from tests.labels import IGNORE, labels_of
from tests.task.test_losses import loss_of

PAD = 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return rows(tmp_path_factory.mktemp("rows"), 50)


def rows(folder: Path, count: int) -> Rows:
    return make_rows(folder, [[n + 1] * (2 + n % 5) for n in range(count)])


def loader(
    data: Rows, world: int = 1, rank: int = 0, size: int = 8, micro: int = 2, **more: Any
) -> TrainLoader:
    plan = BatchPlan(
        global_batch_size=size,
        micro_batch_size=micro,
        accumulation_steps=size // micro // world,
        world_size=world,
    )
    return TrainLoader(data, plan, rank, 42, Collator(pad_token_id=PAD, masked=True), **more)


def seen(batch: Any) -> list[int]:
    return sorted(
        int(row[0])
        for micro in batch.micro_batches
        for row in micro.input_ids
        if int(row[0]) != PAD
    )


def padded_share(batches: list[Any]) -> float:
    micro = [batch for step in batches for batch in step.micro_batches]
    real = sum(int(batch.attention_mask.sum()) for batch in micro)
    return 1 - real / sum(int(batch.attention_mask.numel()) for batch in micro)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(world: int, data: Rows) -> None:
    whole = list(loader(data).from_position(None, 8))
    shares = [list(loader(data, world, rank).from_position(None, 8)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert sorted(row for share in shares for row in seen(share[step])) == seen(batch)
        assert {share[step].loss_weight for share in shares} == {batch.loss_weight}
        assert all(share[step].position == batch.position for share in shares)


def trained_labels(batch: Batch) -> int:
    return int((labels_of(batch)[:, 1:] != IGNORE).sum())


def test_each_row_comes_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    one = loader(rows(tmp_path, 24))
    first = [row for start in (0, 8, 16) for row in one.row_numbers(start)]
    second = [row for start in (24, 32, 40) for row in one.row_numbers(start)]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 4)])
def test_a_resumed_run_sees_every_remaining_row_exactly_once(
    before: int, after: int, data: Rows
) -> None:
    steps = 10
    undisturbed = list(loader(data).from_position(None, steps))
    for cut in (1, 4, 9):
        # The position goes through a checkpoint's JSON.
        (*_, last) = loader(data, before, rank=before - 1).from_position(None, cut)
        position = json.loads(json.dumps(last.position))
        rest = [
            list(loader(data, after, rank).from_position(position, steps - cut))
            for rank in range(after)
        ]
        for step, batch in enumerate(undisturbed[cut:]):
            assert sorted(row for share in rest for row in seen(share[step])) == seen(batch)


def test_a_position_of_other_rows_is_refused(data: Rows, tmp_path: Path) -> None:
    position = next(iter(loader(rows(tmp_path, 10)).from_position(None, 1))).position
    with pytest.raises(CheckpointError, match=r"'rows': 10.*'rows': 50"):
        next(loader(data).from_position(position, 1))


def test_the_last_step_of_whole_epochs_is_smaller_and_trains_nothing_twice(tmp_path: Path) -> None:
    _, last = loader(rows(tmp_path, 10), last_row=10).from_position(None, 2)
    assert len(seen(last)) == 2
    assert len(last.micro_batches) == 4, "every rank goes through as many forward passes"
    counted = sum(map(trained_labels, last.micro_batches))
    assert counted == last.loss_weight


@pytest.mark.process
def test_worker_processes_change_nothing(data: Rows) -> None:
    alone = list(loader(data).from_position(None, 6))
    helped = list(loader(data, settings=LoaderSettings(workers=2)).from_position(None, 6))
    for one, other in zip(alone, helped, strict=True):
        assert one.position == other.position
        for first, second in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(first.input_ids, second.input_ids)
            assert torch.equal(labels_of(first), labels_of(second))


def test_rows_of_like_length_share_a_micro_batch(data: Rows) -> None:
    grouped = padded_share(list(loader(data, size=40, micro=4).from_position(None, 1)))
    alone = padded_share(list(loader(data, size=4, micro=4).from_position(None, 10)))
    assert grouped < alone / 2


def test_the_denominator_is_the_number_of_trained_labels(data: Rows) -> None:
    for batch in loader(data).from_position(None, 4):
        counted = sum(
            int((labels_of(micro)[:, 1:] != IGNORE).sum()) for micro in batch.micro_batches
        )
        assert counted == batch.loss_weight
        real = 0
        for micro in batch.micro_batches:
            assert micro.attention_mask is not None
            real += int(micro.attention_mask.sum())
        assert batch.tokens == real


def test_packed_steps_count_the_same_tokens(data: Rows, tmp_path: Path) -> None:
    members, starts = pack_rows(data.documents("lengths"), 12, 0)
    packed = Rows(data.stores, members, starts)
    batches = list(
        loader(packed, size=4, micro=2, last_row=len(packed)).from_position(
            None, -(-len(packed) // 4)
        )
    )
    assert sum(batch.tokens for batch in batches) == int(data.lengths.sum())
    assert sum(batch.loss_weight for batch in batches) == int(data.supervised_tokens.sum())
    for batch in batches:
        counted = sum(
            int((labels_of(micro)[:, 1:] != IGNORE).sum()) for micro in batch.micro_batches
        )
        assert counted == batch.loss_weight


def test_padding_is_masked_by_position_even_where_it_is_the_end_token(tmp_path: Path) -> None:
    data = make_rows(tmp_path, [[5, 9], [5, 6, 7, 9]], [[False, True], [False, True, True, True]])
    assert Collator(pad_token_id=9).collate(data, [0, 1]).attention_mask is None
    batch = Collator(pad_token_id=9, masked=True).collate(data, [0, 1])
    assert labels_of(batch).tolist() == [[IGNORE, 9, IGNORE, IGNORE], [IGNORE, 6, 7, 9]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_batch_falls_apart_into_its_rows(tmp_path: Path) -> None:
    data = make_rows(
        tmp_path, [[5, 9], [5, 6, 7, 9], [4]], [[False, True], [False, True, True, True], [False]]
    )
    batch = Collator(pad_token_id=9, masked=True).collate(data, [0, 1, 2, None])
    rows = batch.split()
    assert [labels_of(row).tolist()[0] for row in rows] == labels_of(batch).tolist()
    assert [len(row.targets) for row in rows] == [1, 3, 0, 0]
    assert torch.equal(torch.cat([row.input_ids for row in rows]), batch.input_ids)
    assert torch.equal(torch.cat([row.attention_mask for row in rows]), batch.attention_mask)  # type: ignore[misc, arg-type]


def test_evaluation_covers_each_row_once_with_equal_rounds(tmp_path: Path) -> None:
    data = rows(tmp_path, 11)
    shares = [
        list(iterate_eval(data, 2, rank, 2, Collator(pad_token_id=PAD), None)) for rank in range(2)
    ]
    assert len(shares[0]) == len(shares[1]) == 3
    found = sorted(
        int(row[0])
        for share in shares
        for batch in share
        for row in batch.input_ids
        if int(row[0]) != PAD
    )
    assert found == list(range(1, 12))
    assert len(list(iterate_eval(data, 2, 0, 1, Collator(pad_token_id=PAD), max_rows=4))) == 2


def test_the_loss_is_the_sum_over_trained_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = (
        torch.randn(2, 5, 7),
        torch.tensor([[0, 1, IGNORE, 3, 4], [IGNORE, IGNORE, 2, 2, IGNORE]]),
    )
    total, count = loss_of(logits, labels)
    reference = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 7),
        labels[:, 1:].reshape(-1),
        reduction="none",
        ignore_index=IGNORE,
    )
    assert count == int((labels[:, 1:] != IGNORE).sum()) == 5
    torch.testing.assert_close(total, reference.sum())


def test_rows_are_found_in_whichever_store_they_lie(tmp_path: Path) -> None:
    first, second = (
        make_rows(tmp_path / "a", [[1, 2], [3, 4]]),
        make_rows(tmp_path / "b", [[5, 6], [7, 8, 9]]),
    )
    both = Rows([*first.stores, *second.stores], np.array([3, 0, 2], dtype=np.int64))
    assert [both.row(number).ids.tolist() for number in range(3)] == [[7, 8, 9], [1, 2], [5, 6]]
    assert both.lengths.tolist() == [3, 2, 2]
    assert both.location(0) == ("rows.jsonl", 2)
