"""Input that is made to cost time or memory, or to run something, is refused at once; what is right
is read as before.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.data.read import readers, size_bounds
from llmtune.data.read.blocks import parse_rows
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import DataFile, Source
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.tool_calls import parse_tool_calls, read_tools
from llmtune.errors import CheckpointError, DataError, ExportError
from llmtune.export.sources.deepspeed.pickle_reader import read_archive
from llmtune.export.sources.deepspeed.zero_source import ZeroSource
from llmtune.storage.manifest import find_damage, write_manifest
from llmtune.storage.plain_json import MAX_DEPTH, check_depth, decode_json, parse_json
from llmtune.storage.tensors.safetensors_header import read_header
from llmtune.tuner.pattern_limits import pattern_problem
from llmtune.tuner.stored_adapter import read_adapter_config
from tests.security.archives import tensor, write_archive

#: A slow machine with a busy neighbor; what was quadratic or exponential took minutes, or for ever.
SECONDS = 10.0


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def objects(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


def rows_of(file: Path, kind: str = "jsonl") -> list[Any]:
    source = Source(path=str(file), format="text")
    return [
        row
        for block in read_blocks(DataFile(str(file), kind), source)
        for _, row in parse_rows(block)
    ]


# Depth


@pytest.mark.parametrize("make", [nested, objects])
def test_depth_100_is_read_and_what_nobody_means_is_refused(make: Callable[[int], str]) -> None:
    for text in (
        make(100),
        make(MAX_DEPTH - 1),
        "[" + ", ".join([make(3)] * 300) + "]",
        json.dumps("[" * 500),
    ):
        assert (
            parse_json(text)
            == json.loads(text)
            == parse_json(text.encode())
            == decode_json(text, 0)[0]
        )
    for depth in (MAX_DEPTH + 2, 900, 100_000):
        for given in (make(depth), make(depth).encode()):
            with pytest.raises(ValueError, match="nested too deeply"):
                parse_json(given)
        with pytest.raises(ValueError, match="nested too deeply"):
            decode_json(make(depth), 0)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 900, 100_000])
def test_a_deep_row_is_one_bad_row_wherever_the_depth_is(depth: int, tmp_path: Path) -> None:
    deep = objects(depth)
    good = json.dumps({"text": "fine"})
    (tmp_path / "a.jsonl").write_text(f'{good}\n{{"text": {deep}}}\n{good}\n')
    first, bad, last = rows_of(tmp_path / "a.jsonl")
    assert (first, last) == ({"text": "fine"}, {"text": "fine"})
    assert isinstance(bad, RowError)
    assert "nested too deeply" in str(bad)
    (tmp_path / "a.json").write_text(f'[{good}, {{"text": {deep}}}]')
    with pytest.raises(DataError, match="broken JSON: nested too deeply"):
        rows_of(tmp_path / "a.json", "json")
    call = '[{"name": "f", "arguments": ' + deep + "}]"
    for read in (
        lambda: parse_tool_calls(call, "messages[0]"),
        lambda: read_tools({"tools": nested(depth)}),
    ):
        with pytest.raises(RowError):
            read()


def test_rows_of_depth_100_are_read_by_every_reader(tmp_path: Path) -> None:
    row = {"text": "fine", "meta": json.loads(objects(95))}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([row, row], indent=1))
    assert rows_of(tmp_path / "a.jsonl") == [row]
    assert rows_of(tmp_path / "a.json", "json") == [row, row]


def test_looking_at_the_depth_takes_no_time() -> None:
    wide = [{"role": "user", "content": "x" * 50, "list": [1, 2, 3]} for _ in range(100_000)]
    began = time.monotonic()
    check_depth(wide)
    assert time.monotonic() - began < SECONDS / 5


@pytest.mark.parametrize("name", ["adapter_config.json", "manifest.json"])
def test_small_files_of_others_may_be_deep_too(name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, {}, {})
    (tmp_path / "COMPLETE").write_text("x")
    (tmp_path / name).write_text(objects(100_000))
    if name == "manifest.json":
        assert "nested too deeply" in find_damage(tmp_path)[0]
    else:
        with pytest.raises(CheckpointError, match="nested too deeply"):
            read_adapter_config(tmp_path)


# Length


def test_a_long_line_takes_time_by_its_length_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joining the parts of a line again for each block took the square of it: here half a minute
    instead of half a second.
    """
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 7)
    text = "x" * 16_000_000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode(), 1))
    began = time.process_time()
    assert rows_of(tmp_path / "a.jsonl.gz") == [{"text": text}]
    assert time.process_time() - began < SECONDS / 2


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl", "a.csv"])
def test_what_unpacks_to_a_row_without_end_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (readers, size_bounds):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 20)
    monkeypatch.setattr(size_bounds, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 16)
    content = (b"[" if "json." in name and "jsonl" not in name else b"text\n") + b"x" * 9_000_000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match="a row of more than 1 MiB|unpacks to more than 1 MiB"):
        rows_of(tmp_path / name, name.split(".")[1])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_what_is_packed_as_text_is_packed_is_read_whatever_its_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (readers, size_bounds):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 16)
    rows = [{"text": f"{number} {number * number} שלום\u200d"} for number in range(20_000)]
    text = {
        "a.jsonl.gz": "\n".join(map(json.dumps, rows)),
        "a.json.gz": json.dumps(rows),
        "a.csv.gz": "text\n" + "\n".join(row["text"] for row in rows),
    }[name]
    assert len(text) > 4 << 16
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert rows_of(tmp_path / name, name.split(".")[1]) == rows


# Patterns

RIGHT_PATTERNS = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    r".*layers\.(0|1|2)\..*q_proj",
    r"^model.decoder.layers.0.k_proj",
    r"layers.[0-9]+.mlp",
    r".*\.(q|k|v|o)_proj$",
    r"(model\.)?layers\.(\d|[12]\d|3[01])\.(self_attn|mlp)\..*",
    r".*(self_attn|mlp).*(q_proj|k_proj|gate_proj|up_proj).*",
    r"^(?!.*vision).*(?:q_proj|v_proj).*$",
    r"(ab){2}",
    "|".join(f"layers.{number}.q_proj" for number in range(80)),
]
COSTLY_PATTERNS = [
    "(a+)+$",
    "(a|a)*b",
    "(a*)*",
    "(.*)*x",
    "(a|b|ab)*c",
    "(a{1,20}){1,20}",
    "(\\w+\\s?)*$",
    r"(x)\1",
    ".*.*.*.*.*x",
    "(a|ab)(c|bcd)(d*)" * 20,
    "(?:a?){40}" + "a" * 40,
    "a?" * 40 + "a" * 40,
    "(" * 5000,
    "(",
    "[",
    "a{9999999999}",
    *("(?P<n>a)(?(n)b|c)", "a" * 100_000, "((a+)+)+", "(?:(?:a+)b?)+c"),
]


@pytest.mark.parametrize("pattern", RIGHT_PATTERNS)
def test_patterns_that_people_write_are_right_and_cost_nothing(pattern: str) -> None:
    assert pattern_problem(pattern) is None
    began = time.monotonic()
    for name in (
        "model.layers.31.self_attn.q_proj",
        "a" * 200,
        "layers." * 30,
        "model.layers.1." * 12,
    ):
        re.match(rf"(.*\.)?({pattern})$", name)
    assert time.monotonic() - began < SECONDS / 5


@pytest.mark.parametrize("pattern", COSTLY_PATTERNS, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
)
def test_an_adapter_with_a_pattern_that_takes_years_is_refused(
    pattern: str, key: str, tmp_path: Path
) -> None:
    value: Any = {pattern: 4} if key.endswith("_pattern") and key != "layers_pattern" else pattern
    began = time.monotonic()
    for given in [value] if key != "layers_pattern" else [pattern, [pattern]]:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: given}))
        with pytest.raises(CheckpointError, match=f"adapter_config.json: {key} has the pattern"):
            read_adapter_config(tmp_path)
    assert time.monotonic() - began < SECONDS / 5


# Checkpoints of DeepSpeed


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((10**13,), (0,)),
        ((10**6, 10**6), (0, 0)),
        ((10**13,), (1,)),
        ((2,), (10**18,)),
        ((-1,), (1,)),
        ((2, 2), (1,)),
    ],
)
def test_a_tensor_that_is_larger_than_its_file_is_refused(
    shape: Any, stride: Any, tmp_path: Path
) -> None:
    file = write_archive(tmp_path / "a.pt", {"x": tensor(shape, stride)})
    with pytest.raises(ExportError, match="a.pt cannot be read"):
        read_archive(file)


def test_views_of_every_right_kind_are_read(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    views = {
        "whole": whole,
        "turned": whole.T,
        "part": whole[1:, ::2],
        "expanded": torch.ones(1, 1, 64).expand(8, 64, 64),
        "empty": torch.zeros(0, 5),
        "one": torch.tensor(2.5),
        "half": whole.to(torch.bfloat16),
    }
    torch.save(views, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt")
    for name, view in views.items():
        assert torch.equal(found[name].open(), view), name


class Bomb:
    """What runs where a pickle is believed."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("key", [("a",), None, 5, ["x"]])
def test_a_pickle_runs_nothing_and_says_nothing_at_length(key: Any, tmp_path: Path) -> None:
    file = write_archive(tmp_path / "bomb.pt", {"x": Bomb(tmp_path / "ran")})
    read_archive(file)
    assert not (tmp_path / "ran").exists()
    deep: Any = "lol"
    for _ in range(60):
        # A line of text with as many words as there are atoms in a stone.
        deep = [deep, deep]
    began = time.monotonic()
    for value in ({"x": tensor((2,), (1,), key=key)}, {"x": tensor((2,), (1,), numel=deep)}):
        with pytest.raises(ExportError) as caught:
            read_archive(write_archive(tmp_path / "a.pt", value))
        assert len(str(caught.value)) < 1000
    assert time.monotonic() - began < SECONDS


def test_numbers_of_ranks_without_end_are_refused_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    group = {"single_partition_of_fp32_groups": [tensor((4,), (1,))], "partition_count": 10**18}
    write_archive(
        tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"optimizer_state_dict": group}
    )
    with pytest.raises(ExportError, match=f"was written by {10**18} ranks, and .* is missing"):
        ZeroSource(tmp_path)
    (tmp_path / f"zero_pp_rank_{10**15}_mp_rank_00_optim_states.pt").write_bytes(b"x")
    with pytest.raises(ExportError, match="of rank 1, 2, 3, 4 and .* more is missing"):
        ZeroSource(tmp_path)
    assert time.monotonic() - began < SECONDS


# Headers and manifests


def header(text: bytes | str, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: Any) -> str:
    return json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(entry(), length=2**63),
        header(entry(), length=10**9),
        header("{", b""),
        header("[]"),
        header(objects(100_000)),
        header(b"\xff\xfe"),
        header("1"),
        header('{"x": 1}'),
        header('{"x": {}}'),
        b"\0" * 8,
        *(
            header(entry(data_offsets=offsets))
            for offsets in ([0, 17], [8, 4], [-1, 4], [0], [0, 1, 2], [0.0, 4], "ab", None)
        ),
        *(header(entry(shape=shape)) for shape in ([-1], [1.5], ["a"], None, "4", [True])),
        *(header(entry(dtype=dtype)) for dtype in (None, 4, ["F32"])),
    ],
)
def test_a_header_that_says_what_the_file_does_not_hold_is_refused(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    # Whatever the reason, who reads it says which file.
    with pytest.raises(ValueError):  # noqa: PT011
        read_header(tmp_path / "model.safetensors")


def test_a_right_header_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.tensor(1, dtype=torch.int8)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: about.shape for name, about in found.items()} == {"a": (2, 3), "b": (0,), "c": ()}


@pytest.mark.parametrize(
    "files",
    [
        {"a": {"size": float("inf"), "xxh3_128": ""}},
        {"a": {"size": float("nan"), "xxh3_128": ""}},
        {"a": 1},
        [1],
        5,
        {"a" * 5000: {"size": 1, "xxh3_128": ""}},
        {"a\0b": {"size": 1, "xxh3_128": ""}},
        {"../x": {"size": 1, "xxh3_128": ""}},
        {"": {"size": 0, "xxh3_128": ""}},
        {"a/" * 2000: {"size": 0, "xxh3_128": ""}},
        {"\ud800": {"size": 0, "xxh3_128": ""}},
    ],
)
def test_a_manifest_may_say_anything_and_is_not_believed(files: Any, tmp_path: Path) -> None:
    import xxhash

    text = json.dumps({"files": files}).encode()
    (tmp_path / "manifest.json").write_bytes(text)
    (tmp_path / "COMPLETE").write_text(xxhash.xxh3_128(text).hexdigest())
    assert find_damage(tmp_path)
