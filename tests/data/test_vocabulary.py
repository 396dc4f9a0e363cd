"""Tokens that the model has no embedding for are refused with the row that holds them, before any
rank starts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.data.load.streaming import RowStream
from llmtune.data.prepare import prepare_data
from llmtune.data.store.vocabulary import check_block, check_stores, embedding_rows
from llmtune.errors import ConfigError, DataError


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A model folder, and a tokenizer that is too large for it."""
    return tiny_model, add_token(tiny_model)


def add_token(folder: Path) -> Any:
    """A model's tokenizer, with one token more than the model has embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = embedding_rows(folder)
    assert rows is not None
    while len(tokenizer) <= rows:
        tokenizer.add_tokens([f"<added {len(tokenizer)}>"])
    return tokenizer


def write_rows(folder: Path, tokenizer: Any, bad_line: int | None, count: int = 40) -> Path:
    file = folder / f"rows-{bad_line}.jsonl"
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    said = [
        f"answer {line}" + (f" {last}" if line == bad_line else "") for line in range(1, count + 1)
    ]
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]}
        for text in said
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("bad_line", [1, 17, 40, None])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_row_is_named(
    bad_line: int | None, streaming: bool, model: Any, tmp_path: Path
) -> None:
    folder, tokenizer = model
    file = write_rows(tmp_path, tokenizer, bad_line)
    overrides = ["model=tiny", f"data.train={file}", "data.val_set_size=0", "data.num_workers=0"]
    config = compose_config([*overrides, f"data.streaming={streaming}", "train.max_steps=1"]).config

    def check() -> None:
        if streaming:
            RowStream(config.data, tokenizer, 0, model_folder=folder).find_unknown_fields()
        else:
            check_stores(
                prepare_data(config.data, tokenizer, 0, tmp_path / "cache").train_stores,
                folder,
                tokenizer,
            )

    if bad_line is None:
        check()
        return
    with pytest.raises(DataError) as caught:
        check()
    text = str(caught.value)
    assert text.startswith(f"{file}:{bad_line}: token {len(tokenizer) - 1} (")
    assert f"has {embedding_rows(folder)}, its tokenizer {len(tokenizer)}" in text


def test_every_row_is_listed_by_the_data_verb(
    model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = model
    own = tmp_path / "model"
    shutil.copytree(folder, own)
    tokenizer.save_pretrained(own)
    train, held_out = (
        write_rows(tmp_path, tokenizer, 17),
        write_rows(tmp_path, tokenizer, 3, count=5),
    )
    given = [
        f"model.name_or_path={own}",
        f"data.train={train}",
        f"output_dir={tmp_path / 'out'}",
        "data.num_workers=0",
    ]
    for sources, expected in (
        (["data.val_set_size=4"], [(str(train), 17)]),
        ([f"data.eval={held_out}"], [(str(train), 17), (str(held_out), 3)]),
        (["data.val_set_size=0", "data.overlong=truncate"], [(str(train), 17)]),
    ):
        assert main(["data", "--json", *given, *sources]) == DataError.exit_code
        found = json.loads(capfd.readouterr().out)
        beyond = [
            problem for problem in found["problems"] if "has no embedding" in problem["message"]
        ]
        assert [(problem["file"], problem["line"]) for problem in beyond] == expected
        assert found["refused"]
        assert found["rows"] > 0, "the rest of the report is there all the same"
    assert main(["data", *given, "data.val_set_size=0"]) == DataError.exit_code
    assert f"{train}:17: token {len(tokenizer) - 1} (" in capfd.readouterr().out


@pytest.mark.parametrize("known_end", [True, False])
def test_a_padding_token_beyond_the_embedding_is_refused(
    known_end: bool, model: Any, tmp_path: Path
) -> None:
    folder, tokenizer = model
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    check_stores([], folder, tokenizer)
    tokenizer.pad_token = last
    advice = "take model.pad_token='<|im_end|>'"
    if not known_end:
        tokenizer.eos_token, advice = last, "take one that it has"
    with pytest.raises(ConfigError) as caught:
        check_stores([], folder, tokenizer)
    assert f"the padding token {len(tokenizer) - 1} (" in str(caught.value)
    assert advice in str(caught.value)


def test_a_block_is_searched_row_by_row(model: Any) -> None:
    folder, tokenizer = model
    rows = embedding_rows(folder)
    assert rows is not None
    lengths = np.array([3, 1, 2], dtype=np.int32)
    lines = np.array([5, 8, 9], dtype=np.int64)
    for position, line in enumerate((5, 5, 5, 8, 9, 9)):
        ids = np.zeros(6, dtype=np.int32)
        ids[position] = rows
        with pytest.raises(DataError, match=f"^f:{line}: token {rows} "):
            check_block(ids, lengths, ("f", lines), folder, tokenizer)
        ids[position] = rows - 1
        check_block(ids, lengths, ("f", lines), folder, tokenizer)


def test_a_model_that_does_not_say_is_not_asked(tmp_path: Path) -> None:
    assert embedding_rows(tmp_path) is None
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 7}}')
    assert embedding_rows(tmp_path) == 7
    (tmp_path / "config.json").write_text(
        '{"audio_config": {"vocab_size": 3}, "llm_config": {"vocab_size": 9}}'
    )
    assert embedding_rows(tmp_path) == 9
