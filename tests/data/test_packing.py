"""Packed rows: full, complete, and with documents that do not see each other."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from llmtune.config.groups.data import DataConfig
from llmtune.data.formats.format import FORMATS
from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.prepare import prepare_data
from llmtune.data.settings import check_data_settings
from llmtune.data.store.packing import pack_rows, packing_efficiency
from llmtune.data.store.token_store import Row
from llmtune.errors import ConfigError
from tests.labels import labels_of
from tests.task.test_losses import loss_of

CAPACITY = 4096


@pytest.mark.parametrize(
    ("name", "least"),
    [("chat", 0.985), ("lognormal", 0.985), ("long", 0.96), ("one_each", 0.9), ("one", 0.0)],
)
def test_rows_fill_up_and_none_is_lost(name: str, least: float) -> None:
    draw = np.random.default_rng(0)
    lengths = {
        "chat": draw.integers(60, 251, 20_000),
        "lognormal": np.clip(draw.lognormal(5.8, 1, 20_000), 10, CAPACITY),
        "long": draw.integers(500, CAPACITY, 5_000),
        "one_each": np.full(100, CAPACITY),
        "one": np.array([5]),
    }[name].astype(np.int32)
    members, starts = pack_rows(lengths, CAPACITY, seed=1)
    sums = np.add.reduceat(lengths[members], starts[:-1])
    assert sums.max() <= CAPACITY
    assert sorted(members.tolist()) == list(range(len(lengths)))
    efficiency = packing_efficiency(lengths, len(starts) - 1, CAPACITY)
    assert efficiency == pytest.approx(sums.sum() / (len(sums) * CAPACITY))
    assert efficiency >= least


def test_the_packing_depends_on_the_seed_alone() -> None:
    lengths = np.random.default_rng(0).integers(60, 251, 1000).astype(np.int32)
    first, again, other = (pack_rows(lengths, CAPACITY, seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


def test_a_packed_row_mixes_lengths() -> None:
    lengths = np.random.default_rng(0).integers(60, 251, 20_000).astype(np.int32)
    members, starts = pack_rows(lengths, CAPACITY, seed=1)
    within = np.mean([lengths[members[a:b]].std() for a, b in itertools.pairwise(starts)])
    assert within > 0.8 * lengths.std()


def documents(count: int = 7, vocabulary: int = 500) -> list[Row]:
    """Rows of several documents each: 3, 2, 1 and the rest."""
    draw = np.random.default_rng(3)
    made = []
    for _ in range(count):
        length = int(draw.integers(3, 40))
        made.append(
            Row(
                ids=draw.integers(5, vocabulary, length).astype(np.int32),
                mask=np.arange(length) > 0,
                documents=(length,),
            )
        )
    return made


def join(rows: list[Row]) -> Row:
    ids = np.concatenate([row.ids for row in rows])
    mask = np.concatenate([row.mask for row in rows])
    return Row(ids=ids, mask=mask, documents=tuple(len(row.ids) for row in rows))


def packed(rows: list[Row], varlen: bool = False) -> Batch:
    return Collator(pad_token_id=0, varlen=varlen).pack(
        [join(rows[:3]), join(rows[3:5]), join(rows[5:6]), join(rows[6:])]
    )


@functools.cache
def load(folder: Path, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits
    return logits


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """What FlashAttention's varlen kernel computes, document by document, from the same index."""
    assert mask is None
    begins = given["cu_seq_lens_q"].tolist()
    assert begins == given["cu_seq_lens_k"].tolist()
    assert given["max_length_q"] == max(np.diff(begins))
    assert begins[-1] == query.shape[2]
    parts = []
    for begin, end in itertools.pairwise(begins):
        q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=given["scaling"], enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_packed_logits_equal_unpacked_ones_for_every_document(
    attention: str, tiny_model: Path
) -> None:
    AttentionInterface.register("varlen_reference", varlen_attention)
    AttentionMaskInterface.register("varlen_reference", lambda *_, **__: None)
    rows = documents()
    varlen = attention == "varlen"
    batch = packed(rows, varlen)
    together = logits_of(load(tiny_model, "varlen_reference" if varlen else attention), batch)
    width = packed(rows).input_ids.shape[1]
    together = together.view(4, width, -1)
    alone = load(tiny_model, "sdpa")
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (3, 0)]
    for number, (line, position) in enumerate(places):
        before = {0: rows[:3], 1: rows[3:5], 2: rows[5:6], 3: rows[6:]}[line][:position]
        start = sum(len(row.ids) for row in before)
        part = together[line, start : start + len(rows[number].ids)]
        reference = logits_of(alone, Collator(pad_token_id=0).pad([rows[number]]))[0]
        assert float((part - reference).abs().max()) <= 1e-4


def test_changing_one_document_changes_no_others_loss(tiny_model: Path) -> None:
    model = load(tiny_model, "sdpa")
    rows = documents()
    before = [join(rows[:3]), join(rows[3:])]
    changed = replace(rows[1], ids=(rows[1].ids + 1) % 500)
    after = [join([rows[0], changed, rows[2]]), join(rows[3:])]
    collator = Collator(pad_token_id=0)

    def losses(given: list[Row]) -> dict[tuple[int, int], float]:
        batch = collator.pack(given)
        logits = logits_of(model, batch)
        found = {}
        for line, row in enumerate(given):
            start = 0
            for number, length in enumerate(row.documents):
                piece = slice(start, start + length)
                total, count = loss_of(
                    logits[line : line + 1, piece], labels_of(batch)[line : line + 1, piece]
                )
                assert count == length - 1
                found[line, number] = float(total)
                start += length
        return found

    one, other = losses(before), losses(after)
    assert one.pop((0, 1)) != other.pop((0, 1))
    assert one == other, "not even in the last digit"


def test_the_first_token_of_a_document_is_no_target() -> None:
    labels = labels_of(packed(documents()))
    lengths = [len(row.ids) for row in documents()]
    assert labels[0, lengths[0]] == -100
    assert labels[0, lengths[0] + lengths[1]] == -100
    assert labels[0, lengths[0] - 1] != -100


def test_the_varlen_index_is_the_one_that_transformers_would_derive() -> None:
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    batch = packed(documents(), varlen=True)
    assert batch.varlen is not None
    (cu_seq_lens, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch.position_ids)
    assert batch.varlen.cu_seq_lens.tolist() == cu_seq_lens.tolist()
    assert batch.varlen.max_length == int(longest)
    assert batch.varlen.cu_seq_lens.dtype == torch.int32


def labelled_format(monkeypatch: pytest.MonkeyPatch) -> str:
    """A format with labels from outside llmtune."""
    monkeypatch.setattr(FORMATS, "_variants", dict(FORMATS.list()))
    classification = FORMATS.find("classification")
    graded = replace(
        classification,
        name="graded",
        fields=classification.fields | {"grade"},
        marks=(frozenset({"grade"}),),
        priority=1,
    )
    return FORMATS.register(graded).name


@pytest.mark.parametrize("name", ["classification", "graded"])
@pytest.mark.parametrize("per_source", [False, True])
def test_rows_with_labels_are_not_packed(
    name: str, per_source: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled_format(monkeypatch)
    source = {"path": "a.jsonl", "format": name} if per_source else "a.jsonl"
    config = DataConfig(train=source, format="auto" if per_source else name, packing=True)
    with pytest.raises(ConfigError, match=rf"packing=true: {name} rows cannot share a row"):
        check_data_settings(config)
    check_data_settings(replace(config, packing=False))


def test_texts_are_packed_beside_a_default_format_that_nothing_has() -> None:
    source = {"path": "a.jsonl", "format": "text"}
    check_data_settings(DataConfig(train=[source], format="classification", packing=True))
    check_data_settings(DataConfig(train="a.jsonl", packing=True))


@pytest.mark.parametrize("plugin", [False, True])
def test_labels_that_the_file_shows_are_not_packed(
    plugin: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its format is known only when it is read, or from the cache."""
    name = labelled_format(monkeypatch) if plugin else "classification"
    row = {"text": "good", "label": "a", **({"grade": 1} if plugin else {})}
    file = tmp_path / "rows.jsonl"
    other = {**row, "label": "b"}
    file.write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n" * 10)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = DataConfig(train=str(file), val_set_size=0, num_workers=0)
    prepare_data(config, tokenizer, 1, tmp_path / "cache")
    with pytest.raises(ConfigError, match=rf"packing=true: {name} rows cannot share a row"):
        prepare_data(replace(config, packing=True), tokenizer, 1, tmp_path / "cache")
