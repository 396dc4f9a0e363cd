"""Batches: the same rows for any number of ranks, padding that trains nothing, each row once an epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from llmtune.data.loader import IGNORE, TrainLoader, collate, iterate_eval
from llmtune.model.loss import IGNORE as LOSS_IGNORE
from llmtune.model.loss import sum_token_losses
from llmtune.plan.batch import BatchPlan

PAD = 0


def rows(count: int) -> Dataset:
    ids = [[n + 1] * (2 + n % 5) for n in range(count)]
    masks = [[False] + [True] * (len(row) - 1) for row in ids]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "mask": masks,
            "length": [len(row) for row in ids],
            "trained_tokens": [sum(mask) for mask in masks],
        }
    )


def loader(data: Dataset, world: int = 1, rank: int = 0, size: int = 8, micro: int = 2, **more: Any) -> TrainLoader:
    return TrainLoader(data, BatchPlan(size, micro, size // micro // world, world), rank, 42, PAD, **more)


def seen(batch: Any) -> list[int]:
    return sorted(int(row[0]) for micro in batch.micro_batches for row in micro.input_ids if int(row[0]) != PAD)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(world: int) -> None:
    data = rows(50)
    for step in (0, 3, 7):
        whole = seen(loader(data).step(step))
        shares = [loader(data, world, rank).step(step) for rank in range(world)]
        assert sorted(row for share in shares for row in seen(share)) == whole
        assert {share.trained_tokens for share in shares} == {loader(data).step(step).trained_tokens}


def test_each_row_comes_once_an_epoch_in_another_order() -> None:
    data = rows(24)
    one = loader(data)
    first = [row for step in range(3) for row in one.row_indices(step)]
    second = [row for step in range(3, 6) for row in one.row_indices(step)]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert loader(data).row_indices(4) == one.row_indices(4)


def test_the_last_step_of_whole_epochs_is_smaller_and_trains_nothing_twice() -> None:
    data = rows(10)
    last = loader(data, last_row=10).step(1)
    assert len(seen(last)) == 2
    assert len(last.micro_batches) == 4, "every rank goes through as many forward passes"
    counted = sum(int((micro.labels[:, 1:] != IGNORE).sum()) for micro in last.micro_batches)
    assert counted == last.trained_tokens


def test_the_denominator_is_the_number_of_trained_labels() -> None:
    batch = loader(rows(50)).step(2)
    counted = sum(int((micro.labels[:, 1:] != IGNORE).sum()) for micro in batch.micro_batches)
    assert counted == batch.trained_tokens
    assert batch.tokens == sum(int(micro.attention_mask.sum()) for micro in batch.micro_batches)


def test_padding_is_masked_by_position_even_where_it_is_the_end_token() -> None:
    data = Dataset.from_dict({"input_ids": [[5, 9], [5, 6, 7, 9]], "mask": [[False, True], [False, True, True, True]]})
    batch = collate(data, [0, 1], pad_token_id=9)
    assert batch.labels.tolist() == [[IGNORE, 9, IGNORE, IGNORE], [IGNORE, 6, 7, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_evaluation_covers_each_row_once_with_equal_rounds() -> None:
    data = rows(11)
    shares = [list(iterate_eval(data, 2, rank, 2, PAD, None)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 3
    found = sorted(int(row[0]) for share in shares for batch in share for row in batch.input_ids if int(row[0]) != PAD)
    assert found == list(range(1, 12))
    assert len(list(iterate_eval(data, 2, 0, 1, PAD, max_rows=4))) == 2


def test_the_loss_is_the_sum_over_trained_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[0, 1, IGNORE, 3, 4], [IGNORE, IGNORE, 2, 2, IGNORE]])
    total, count = sum_token_losses(logits, labels)
    reference = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), reduction="none", ignore_index=LOSS_IGNORE
    )
    assert LOSS_IGNORE == IGNORE
    assert count == int((labels[:, 1:] != IGNORE).sum()) == 5
    torch.testing.assert_close(total, reference.sum())
