"""Arrow is looked at before anything in it is followed: one wrong offset ended the process, or
showed foreign memory as text.
"""

from __future__ import annotations

import datetime
import io
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtune.data.read import arrow_files
from llmtune.data.read.blocks import parse_rows
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import DataFile, Source
from llmtune.errors import DataError

TEXTS = ["first row", "second row", None, "päß 日本 👩‍💻 שלום\tend"]


def write(folder: Path, batch: pa.RecordBatch, stream: bool = False) -> Path:
    file = folder / "rows.arrow"
    out = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(out, batch.schema) as writer:
        writer.write_batch(batch)
    file.write_bytes(out.getvalue())
    return file


def read(file: Path, kind: str = "arrow") -> list[Any]:
    source = Source(path=str(file), format="text")
    return [
        row
        for block in read_blocks(DataFile(str(file), kind), source)
        for _, row in parse_rows(block)
    ]


def replace_offset(file: Path, old: list[int], new: list[int], width: str = "i") -> None:
    """Put other offsets in the place of those that the file has."""
    content = file.read_bytes()
    before, behind = (struct.pack(f"<{len(values)}{width}", *values) for values in (old, new))
    assert content.count(before) == 1
    file.write_bytes(content.replace(before, behind))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("wrong", [[5, 900_000], [5, 2_000_000_000], [90, 10], [-7, 10]])
def test_an_offset_out_of_bounds_is_refused(
    kind: Any, wrong: list[int], stream: bool, tmp_path: Path
) -> None:
    values = (
        ["first", "other", "third"] if "string" in str(kind) else [b"first", b"other", b"third"]
    )
    file = write(tmp_path, pa.record_batch({"text": pa.array(values, kind)}), stream)
    assert len(read(file)) == 3
    replace_offset(file, [0, 5, 10, 15], [0, *wrong, 15], "q" if "large" in str(kind) else "i")
    with pytest.raises(
        DataError,
        match=r"rows.arrow: not an Arrow file that pyarrow reads \(rows 1 to 3: the column 'text'",
    ):
        read(file)


def test_an_offset_of_a_list_and_an_index_of_a_dictionary_are_refused(tmp_path: Path) -> None:
    lists = pa.record_batch({"text": pa.array([["a", "b"], ["c"]])})
    file = write(tmp_path, lists)
    replace_offset(file, [0, 2, 3], [0, 7000, 3])
    with pytest.raises(DataError, match="is damaged"):
        read(file)
    indices = pa.array([1, 0, 1, 1, 0, 1, 0, 1], pa.int8())
    coded = pa.record_batch({"text": pa.DictionaryArray.from_arrays(indices, pa.array(["x", "y"]))})
    file = write(tmp_path, coded)
    content = file.read_bytes()
    raw = bytes([1, 0, 1, 1, 0, 1, 0, 1])
    assert content.count(raw) == 1
    file.write_bytes(content.replace(raw, bytes([1, 0, 1, 99, 0, 1, 0, 1])))
    with pytest.raises(DataError, match="is damaged"):
        read(file)


def test_text_that_is_no_utf8_is_refused_in_arrow_and_in_parquet(tmp_path: Path) -> None:
    offsets = pa.py_buffer(struct.pack("<3i", 0, 2, 4))
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    with pytest.raises(DataError, match="UTF8"):
        read(write(tmp_path, pa.record_batch({"text": bad})))
    pq.write_table(pa.table({"text": bad}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet.*UTF8"):
        read(tmp_path / "rows.parquet", "parquet")


def test_names_and_lengths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        pa.record_batch({"turns of talk": pa.array(["first", "other", "third"])}),
        stream=True,
    )
    content = file.read_bytes()
    file.write_bytes(content.replace(b"turns of talk", b"turns \xc0f talk"))
    with pytest.raises(DataError, match="rows.arrow: not an Arrow file that pyarrow reads .*utf-8"):
        read(file)
    # The length of the data behind the description of the batch.
    messages = pa.ipc.MessageReader.open_stream(io.BytesIO(content))
    messages.read_next_message()
    length = struct.pack("<q", messages.read_next_message().body.size)
    assert content.count(length) >= 1
    file.write_bytes(content.replace(length, struct.pack("<q", 2**62)))
    with pytest.raises(DataError, match="rows.arrow: not an Arrow file that pyarrow reads"):
        read(file)


def test_a_field_in_a_field_whose_name_is_no_utf8_makes_bad_rows(tmp_path: Path) -> None:
    file = write(tmp_path, pa.record_batch({"turn": pa.array([{"role": "a"}, {"role": "b"}])}))
    file.write_bytes(file.read_bytes().replace(b"role", b"rol\xff"))
    assert [str(row) for row in read(file)] == ["not UTF-8 (byte 0xff); save the file as UTF-8"] * 2


def test_right_files_of_every_kind_are_read_as_they_are(tmp_path: Path) -> None:
    columns = {
        "text": pa.array(TEXTS),
        "large": pa.array(TEXTS, pa.large_string()),
        "view": pa.array(TEXTS, pa.string_view()),
        "coded": pa.array(TEXTS).dictionary_encode(),
        "nothing": pa.nulls(4),
        "numbers": pa.array([1, None, 3, 4], pa.int16()),
        "list": pa.array([["a"], [], None, ["b", None]]),
        "list_view": pa.array([["a"], [], None, ["b", None]], pa.list_view(pa.string())),
        "turns": pa.array([[{"role": "user", "content": text}] for text in TEXTS]),
        "map": pa.array([[("k", "v")], [], None, [("x", None)]], pa.map_(pa.string(), pa.string())),
        "run": pa.RunEndEncodedArray.from_arrays([1, 4], ["p", "q"]),
        # As JavaScript writes a time of day.
        "when": pa.array([1, 86_400_001, None, 0], pa.date64()),
        "money": pa.array([None, 1, 2, 3], pa.decimal128(5, 2)),
    }
    batch = pa.record_batch(columns)
    expected = [{**row} for row in batch.to_pylist()]
    assert isinstance(expected[0]["when"], datetime.date)
    for stream in (False, True):
        rows = read(write(tmp_path, batch, stream))
        assert [row["text"] for row in rows] == TEXTS
        assert [
            {key: row[key] for key in ("large", "view", "coded", "numbers", "when", "run")}
            for row in rows
        ] == [
            {key: row[key] for key in ("large", "view", "coded", "numbers", "when", "run")}
            for row in expected
        ]
    file = write(tmp_path, batch.slice(1, 2))
    assert [row["text"] for row in read(file)] == TEXTS[1:3], (
        "a slice has offsets that do not begin at 0"
    )


@pytest.mark.parametrize("drawn", [None, [2, 0]])
def test_a_saved_data_set_with_a_wrong_offset_is_refused(
    drawn: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose rows are taken in another order than they lie, which copies them."""
    from datasets import Dataset, load_from_disk

    def load(path: str, _: Source) -> Any:
        loaded = load_from_disk(path)
        return loaded if drawn is None else loaded.select(drawn)

    monkeypatch.setattr(arrow_files, "load_hub", load)
    texts = ["first", "other", "third"]
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    found = [row["text"] for row in read(tmp_path / "saved", "hub")]
    assert found == [texts[number] for number in drawn or range(3)]
    (file,) = (tmp_path / "saved").glob("data-*.arrow")
    replace_offset(file, [0, 5, 10, 15], [0, 5, 900_000, 15])
    with pytest.raises(DataError, match="not a data set that pyarrow reads"):
        read(tmp_path / "saved", "hub")


def test_rows_in_another_order_are_looked_at_before_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of what a wrong offset shows is right by itself, and holds what stands beside the
    column.
    """
    from datasets import Dataset, load_from_disk

    monkeypatch.setattr(
        arrow_files, "load_hub", lambda path, _: load_from_disk(path).select([1, 0])
    )
    Dataset.from_dict({"text": [b"first", b"other", b"third"]}).save_to_disk(
        str(tmp_path / "saved")
    )
    assert [row["text"] for row in read(tmp_path / "saved", "hub")] == [b"other", b"first"]
    (file,) = (tmp_path / "saved").glob("data-*.arrow")
    replace_offset(file, [0, 5, 10, 15], [0, 5, 100, 15])
    with pytest.raises(
        DataError,
        match=r"not a data set that pyarrow reads \(batch 0: the column 'text' is damaged",
    ):
        read(tmp_path / "saved", "hub")
