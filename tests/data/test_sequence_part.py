"""The parts of a batch are the batch: its tokens, positions, borders, targets, and rows."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.load.sequence_part import SequencePart
from llmtune.data.store.token_store import Row

PAD = 7

documents = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def make_row(lengths: list[int], seed: int) -> Row:
    """A row of documents, of whose tokens some are trained."""
    draw = np.random.default_rng(seed)
    count = sum(lengths)
    mask = draw.integers(0, 2, count).astype(bool)
    mask[np.cumsum([0, *lengths[:-1]])] = False
    ids = draw.integers(0, 100, count).astype(np.int32)
    return Row(ids=ids, mask=mask, documents=tuple(lengths))


def make_parts(rows: list[Row | None], count: int, packed: bool) -> tuple[Batch, list[Batch]]:
    """The whole batch, and its parts."""

    def collate(part: SequencePart) -> Batch:
        collator = Collator(pad_token_id=PAD, varlen=True, flat=True, part=part)
        return collator.collate_rows(rows, packed)

    return collate(SequencePart()), [collate(SequencePart(index, count)) for index in range(count)]


def positions_of(batch: Batch) -> torch.Tensor:
    """Position ids of the one row."""
    assert batch.position_ids is not None
    return batch.position_ids[0]


@given(
    lengths=st.lists(st.one_of(st.none(), documents), min_size=1, max_size=4),
    count=st.integers(1, 8),
    packed=st.booleans(),
)
def test_parts_one_behind_the_other_are_the_batch_and_padding(
    lengths: list[list[int] | None], count: int, packed: bool
) -> None:
    if not packed:
        lengths = [None if one is None else [sum(one)] for one in lengths]
    rows = [None if one is None else make_row(one, seed) for seed, one in enumerate(lengths)]
    whole, parts = make_parts(rows, count, packed)
    tokens = whole.input_ids.shape[1]
    size = -(-tokens // count)
    assert {part.input_ids.shape for part in parts} == {(1, size)}
    joined = torch.cat([part.input_ids for part in parts], dim=1)[0]
    assert torch.equal(joined[:tokens], whole.input_ids[0])
    assert joined[tokens:].tolist() == [PAD] * (size * count - tokens)
    positions = torch.cat([positions_of(part) for part in parts])
    assert torch.equal(positions[:tokens], positions_of(whole))

    # Every target is in one part, at the position of the whole.
    shifted = [part.targets.positions + index * size for index, part in enumerate(parts)]
    assert torch.equal(torch.cat(shifted), whole.targets.positions)
    assert torch.equal(torch.cat([part.targets.values for part in parts]), whole.targets.values)
    assert sum(part.targets.weight for part in parts) == whole.targets.weight
    assert all(bool((part.targets.positions < size).all()) for part in parts)

    # All parts have the same borders, which are those of the whole and of the padding.
    assert whole.varlen is not None
    for part in parts:
        assert part.varlen is not None
        borders = part.varlen.cu_seq_lens
        assert borders.dtype == torch.int32
        assert borders[-1] == size * count
        assert torch.equal(borders[: len(whole.varlen.cu_seq_lens)], whole.varlen.cu_seq_lens)
        assert part.varlen.max_length == int(borders.diff().max())
        assert bool((positions[borders[:-1].long()] == 0).all())


@given(lengths=st.lists(documents, min_size=1, max_size=4), count=st.integers(2, 5))
def test_the_targets_of_a_row_are_found_in_the_parts(lengths: list[list[int]], count: int) -> None:
    """A row whose loss is not finite is named by a rank that has its token."""
    rows: list[Row | None] = [make_row([sum(one)], seed) for seed, one in enumerate(lengths)]
    whole, parts = make_parts(rows, count, packed=False)
    found = [0] * len(rows)
    for part in parts:
        split = part.split()
        assert sum(one.input_ids.shape[1] for one in split) == part.input_ids.shape[1]
        for index, one in enumerate(split):
            assert bool((one.targets.positions < one.input_ids.shape[1]).all())
            if index < len(rows):
                found[index] += int(one.targets.values.sum())
            else:
                assert len(one.targets) == 0
    assert found == [int(one.targets.values.sum()) for one in whole.split()]
