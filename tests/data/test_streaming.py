"""A stream gives every row once a pass, the same for any number of ranks, and goes on where it
stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig, OnBadRow
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import LoaderSettings, StepBatch
from llmtune.data.load.streaming import RowStream, StreamLoader
from llmtune.data.prepare import prepare_data
from llmtune.errors import CheckpointError, ConfigError, DataError
from llmtune.plan.batch_sizes import BatchPlan
from tests.labels import labels_of


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stream")
    paths = []
    for name, count in (("a", 90), ("b", 50)):
        rows = [
            {"prompt": f"{name}{number}:", "completion": "x" * (number % 7 + 1)}
            for number in range(count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        paths.append(str(path))
    return paths


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is some blocks; files of tests are smaller than one usual block."""
    monkeypatch.setattr("llmtune.data.read.readers.BLOCK_BYTES", 400)


def loader(
    tokenizer: Any,
    train: Any,
    world: int = 1,
    rank: int = 0,
    workers: int = 0,
    bad_rows: Path | None = None,
    **more: Any,
) -> StreamLoader:
    config = DataConfig(
        **{"train": train, "streaming": True, "shuffle_buffer": 30, "max_seq_length": 64, **more}
    )
    plan = BatchPlan(
        global_batch_size=8, micro_batch_size=2, accumulation_steps=4 // world, world_size=world
    )
    return StreamLoader(
        RowStream(config, tokenizer, 42, bad_rows),
        plan,
        rank,
        Collator(pad_token_id=2),
        LoaderSettings(workers),
    )


def names(batches: list[StepBatch], tokenizer: Any) -> list[list[str]]:
    """The rows of each step by their prompts, sorted."""
    found = []
    for batch in batches:
        texts = [
            str(tokenizer.decode(row.tolist()))
            for micro in batch.micro_batches
            for row in micro.input_ids
        ]
        found.append(
            sorted(
                part.split(":")[0]
                for text in texts
                for part in text.split("<|im_end|>")
                if ":" in part
            )
        )
    return found


def test_each_row_comes_once_a_pass_shuffled(tokenizer: Any, files: list[str]) -> None:
    seen = [
        name
        for step in names(list(loader(tokenizer, files).from_position(None, 35)), tokenizer)
        for name in step
    ]
    assert Counter(seen) == {
        f"{name}{n}": 2 for name, count in (("a", 90), ("b", 50)) for n in range(count)
    }
    assert seen[:8] != [f"a{number}" for number in range(8)]
    assert seen[:140] != seen[140:]


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_share_the_same_global_batches(
    packing: bool, tokenizer: Any, files: list[str]
) -> None:
    steps = 6
    whole = list(loader(tokenizer, files, packing=packing).from_position(None, steps))
    for world in (2, 4):
        shares = [
            list(loader(tokenizer, files, world, r, packing=packing).from_position(None, steps))
            for r in range(world)
        ]
        for step in range(steps):
            parts = sorted(name for share in shares for name in names([share[step]], tokenizer)[0])
            assert parts == names([whole[step]], tokenizer)[0]
            assert {share[step].loss_weight for share in shares} == {whole[step].loss_weight}
            assert {json.dumps(share[step].position) for share in shares} == {
                json.dumps(whole[step].position)
            }


@pytest.mark.process
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_stream_goes_on_with_the_next_row(
    packing: bool, workers: int, tokenizer: Any, files: list[str]
) -> None:
    steps = 25 if not packing else 8
    undisturbed = names(
        list(loader(tokenizer, files, packing=packing).from_position(None, steps)), tokenizer
    )
    for cut in (1, 5, steps - 1):
        first = list(
            loader(tokenizer, files, packing=packing, workers=workers).from_position(None, cut)
        )
        position = json.loads(json.dumps(first[-1].position))
        rest = list(
            loader(tokenizer, files, packing=packing, workers=workers).from_position(
                position, steps - cut
            )
        )
        assert names(first + rest, tokenizer) == undisturbed


def test_weights_hold_beyond_the_end_of_the_small_source(tokenizer: Any, files: list[str]) -> None:
    sources = [{"path": files[0], "weight": 1}, {"path": files[1], "weight": 3}]
    steps = list(loader(tokenizer, sources).from_position(None, 60))
    for part in (steps[:30], steps[30:]):
        seen = [name for step in names(part, tokenizer) for name in step]
        assert 0.65 < sum(name.startswith("b") for name in seen) / len(seen) < 0.85


def test_sources_without_weights_take_turns(tokenizer: Any, files: list[str]) -> None:
    seen = [
        name
        for step in names(list(loader(tokenizer, files).from_position(None, 8)), tokenizer)
        for name in step
    ]
    assert 0.3 < sum(name.startswith("b") for name in seen) / len(seen) < 0.7


@pytest.mark.parametrize("buffer", [30, 90, 45, 1000])
def test_a_window_may_end_with_the_last_block_of_a_pass(
    buffer: int, tokenizer: Any, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.data.read.readers.BLOCK_BYTES", 1 << 20)
    steps = list(loader(tokenizer, files[0], shuffle_buffer=buffer).from_position(None, 45))
    seen = Counter(name for step in names(steps, tokenizer) for name in step)
    assert seen == {f"a{number}": 4 for number in range(90)}


def test_a_source_without_a_usable_row_ends_the_stream(
    tokenizer: Any, files: list[str], tmp_path: Path
) -> None:
    empty = tmp_path / "e.jsonl"
    empty.write_text(
        "\n".join(json.dumps({"prompt": "a", "completion": "word " * 300}) for _ in range(20))
    )
    for sources in (
        str(empty),
        [{"path": files[0], "weight": 1}, {"path": str(empty), "weight": 1}],
    ):
        with pytest.raises(DataError, match=r"e.jsonl has no row that can be trained on"):
            list(loader(tokenizer, sources).from_position(None, 20))


def test_what_a_stream_cannot_do_is_said_before_training(
    tokenizer: Any, files: list[str], tmp_path: Path
) -> None:
    def prepare(train: Any) -> Any:
        config = DataConfig(train=train, streaming=True, val_set_size=0, max_seq_length=64)
        return prepare_data(config, tokenizer, 1, tmp_path)

    for rows in (16, 1):
        with pytest.raises(ConfigError, match=f"limit={rows} of"):
            prepare(f"{files[0]}@{rows}")
    with pytest.raises(ConfigError, match=r"hf://datasets/nobody/nothing/"):
        prepare("nobody/nothing")
    labels = tmp_path / "l.csv"
    labels.write_text("text,label\na,b\n")
    with pytest.raises(DataError, match="take data.streaming=false"):
        loader(tokenizer, str(labels)).stream.find_unknown_fields()
    long = tmp_path / "o.jsonl"
    long.write_text(
        "\n".join(
            json.dumps({"prompt": "a", "completion": "word " * (90 if n % 2 else 1)})
            for n in range(40)
        )
    )
    with pytest.raises(
        DataError,
        match=r"first 30 rows are longer than data.max_seq_length=64|rows are longer than",
    ):
        loader(tokenizer, str(long)).stream.find_unknown_fields()


def test_another_template_is_another_stream(
    tokenizer: Any, files: list[str], tmp_path: Path
) -> None:
    config = DataConfig(train=files, streaming=True, val_set_size=0)
    first = prepare_data(config, tokenizer, 1, tmp_path).fingerprint
    tokenizer.chat_template, kept = (
        tokenizer.chat_template + "{# changed #}",
        tokenizer.chat_template,
    )
    try:
        assert prepare_data(config, tokenizer, 1, tmp_path).fingerprint != first
    finally:
        tokenizer.chat_template = kept


def test_packed_documents_stay_whole(tokenizer: Any, files: list[str]) -> None:
    batches = list(loader(tokenizer, files, packing=True).from_position(None, 4))
    for batch in batches:
        assert all(
            micro.position_ids is not None and micro.attention_mask is None
            for micro in batch.micro_batches
        )
        counted = sum(int((labels_of(micro)[:, 1:] >= 0).sum()) for micro in batch.micro_batches)
        assert counted == batch.loss_weight


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_stops_the_stream_or_is_left_out_and_listed(
    workers: int, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": f"a{number}:", "completion": "x" if number != 40 else ""} for number in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"a.jsonl:41: the field 'completion' is empty") as caught:
        list(loader(tokenizer, str(path), workers=workers).from_position(None, 7))
    assert "Traceback" not in str(caught.value)
    bad_rows = tmp_path / "bad_rows.jsonl"
    kept = loader(
        tokenizer, str(path), on_bad_row=OnBadRow.skip, workers=workers, bad_rows=bad_rows
    )
    seen = [name for step in names(list(kept.from_position(None, 7)), tokenizer) for name in step]
    assert sorted(seen[:56]) == sorted(set(seen[:56]))
    assert "a40" not in seen
    assert json.loads(bad_rows.read_text().splitlines()[0])["line"] == 41


def test_fields_that_nobody_reads_are_told_of_the_first_window(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(
        "\n".join(json.dumps({"text": f"{n}", "mood": "good", "id": n}) for n in range(20))
    )
    stream = RowStream(
        DataConfig(train=str(source), streaming=True, max_seq_length=64), tokenizer, 1
    )
    assert stream.find_unknown_fields() == {"mood"}
    source.write_text(json.dumps({"text": "a", "score": 0.5}))
    with pytest.raises(
        DataError, match=r"a.jsonl:1: the field 'score' \(0.5\) says how good an answer is"
    ):
        RowStream(
            DataConfig(train=str(source), streaming=True, max_seq_length=64), tokenizer, 1
        ).find_unknown_fields()


def test_a_position_of_other_data_is_refused(tokenizer: Any, files: list[str]) -> None:
    (batch,) = loader(tokenizer, files).from_position(None, 1)
    with pytest.raises(CheckpointError, match="another number of sources"):
        next(loader(tokenizer, files[0]).from_position(batch.position, 1))
    with pytest.raises(CheckpointError, match="not a stream's"):
        next(loader(tokenizer, files).from_position({"next_row": 5}, 1))
