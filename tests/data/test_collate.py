"""Rows of a batch one behind the other: what padded rows are, without padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data.load.collate import Collator
from llmtune.data.store.token_store import Row

COLLATOR = Collator(pad_token_id=0, varlen=True, flat=True)


@st.composite
def drawn_rows(draw: Any) -> list[Row | None]:
    """Rows of one document, some of them empty places."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    numbers = np.random.default_rng(draw(st.integers(0, 99)))
    return [
        Row(
            ids=numbers.integers(1, 90, length).astype(np.int32),
            mask=numbers.random(length) < draw(st.sampled_from([0.0, 0.5, 1.0])),
            documents=(length,),
        )
        if length
        else None
        for length in lengths
    ]


@settings(max_examples=200, deadline=None)
@given(drawn_rows())
def test_they_train_the_same_tokens_behind_the_same_ones(rows: list[Row | None]) -> None:
    flat, padded = COLLATOR.join(rows), COLLATOR.pad(rows)
    assert flat.varlen is not None
    assert flat.position_ids is not None
    lengths = [max(1, len(row.ids)) if row else 1 for row in rows]
    assert flat.input_ids.shape == flat.position_ids.shape == (1, sum(lengths))
    assert flat.varlen.cu_seq_lens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert (flat.varlen.max_length, flat.varlen.row_lengths) == (max(lengths), tuple(lengths))
    ids, positions = flat.input_ids[0], flat.position_ids[0]
    starts = flat.varlen.cu_seq_lens[:-1].long()
    for start, length, row in zip(starts, lengths, padded.input_ids, strict=True):
        assert torch.equal(ids[start : start + length], row[:length])
        assert torch.equal(positions[start : start + length], torch.arange(length))

    # The same values, from tokens of the same rows and places.
    assert torch.equal(flat.targets.values, padded.targets.values)
    assert flat.targets.weight == padded.targets.weight
    of_row = torch.searchsorted(starts, flat.targets.positions, right=True) - 1
    places = flat.targets.positions - starts[of_row]
    width = padded.input_ids.shape[1]
    assert torch.equal(of_row * width + places, padded.targets.positions)


@settings(max_examples=100, deadline=None)
@given(drawn_rows(), st.booleans())
def test_a_batch_is_split_into_its_rows(rows: list[Row | None], is_flat: bool) -> None:
    batch = COLLATOR.join(rows) if is_flat else COLLATOR.pad(rows)
    logits = torch.randn(*batch.input_ids.shape, 7)
    pieces, of_rows = batch.split_logits(logits), batch.split()
    assert len(pieces) == len(of_rows) == len(rows)
    chosen = logits.flatten(0, 1)[batch.targets.positions]
    own = [
        piece.flatten(0, 1)[one.targets.positions]
        for piece, one in zip(pieces, of_rows, strict=True)
    ]
    assert torch.equal(torch.cat(own), chosen)
    assert torch.equal(torch.cat([one.targets.values for one in of_rows]), batch.targets.values)
    for row, one in zip(rows, of_rows, strict=True):
        tokens = row.ids.tolist() if row else [0]
        assert one.input_ids[0, : len(tokens)].tolist() == tokens
