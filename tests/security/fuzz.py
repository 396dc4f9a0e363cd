"""What a reader of other people's files may do with any bytes at all: give values, or say what is
wrong; and files to change.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from hypothesis import strategies as st

from llmtune.data.formats.format import detect_format
from llmtune.data.read.blocks import parse_rows
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import DataFile, Source
from llmtune.data.rows.problems import RowError
from llmtune.errors import LlmtuneError
from llmtune.export.sources.deepspeed.zero_source import ZeroSource
from llmtune.launch.launchers.hostfile import read_hostfile
from llmtune.launch.launchers.slurm import expand_counts, expand_hosts
from llmtune.storage.manifest import find_damage
from llmtune.storage.tensors.safetensors_header import read_header
from llmtune.tuner.stored_adapter import read_adapter_config

#: Rows of every kind that a file may begin as.
ROWS: list[Any] = [
    {"text": "päß 日本 👩‍💻 שלום\ttab"},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes", "train": True},
        ]
    },
    {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]},
    {
        "messages": [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            }
        ]
    },
    {"text": "a", "label": 1.5},
]


def _read_rows(kind: str, name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        file = folder / name
        file.write_bytes(content)
        for block in read_blocks(DataFile(str(file), kind), Source(path=str(file), format="auto")):
            for _, row in parse_rows(block):
                if not isinstance(row, RowError):
                    try:
                        detect_format(row).read(row)
                    except RowError:
                        continue

    return read


def _read_hostfile(folder: Path, content: bytes) -> None:
    (folder / "hosts").write_bytes(content)
    for host, slots in read_hostfile(folder / "hosts").items():
        assert not host.startswith("-")
        assert 0 < slots < 10_000


def _read_slurm(_: Path, content: bytes) -> None:
    for read in (expand_hosts, expand_counts):
        try:
            found = read(content.decode("utf-8", "replace"))
        except ValueError:
            continue
        assert len(found) <= 65536


def _read_header(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    try:
        found = read_header(folder / "model.safetensors")
    except ValueError:
        return
    assert all(8 <= about.start <= len(content) for about in found.values())


def _read_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMPLETE").write_text(xxhash.xxh3_128(content).hexdigest())
    (folder / "a.txt").write_text("a")
    find_damage(folder)


def _read_adapter(folder: Path, content: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(content)
    read_adapter_config(folder)


def _read_zero(folder: Path, content: bytes) -> None:
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(content)
    source = ZeroSource(folder)
    for name in source.specs:
        for block in source.blocks(name):
            block.sum()


def _zero_files() -> tuple[bytes, bytes]:
    """The optimizer's file of one rank, and the model's."""
    weights = torch.arange(6, dtype=torch.float32)
    group = {"single_partition_of_fp32_groups": [weights], "partition_count": 1, "zero_stage": 2}
    model = {
        "module": {"w": weights.reshape(2, 3).clone(), "b": torch.ones(2)},
        "param_shapes": [{"w": torch.Size([2, 3])}],
        "shared_params": {},
    }
    files = []
    for value in ({"optimizer_state_dict": group}, model):
        out = io.BytesIO()
        torch.save(value, out)
        files.append(out.getvalue())
    return files[0], files[1]


def _arrow(stream: bool) -> bytes:
    texts = ["first", None, "päß 日本"]
    batch = pa.record_batch(
        {
            "text": pa.array(texts),
            "large": pa.array(texts, pa.large_string()),
            "coded": pa.array(texts).dictionary_encode(),
            "turns": pa.array([[{"role": "user", "content": text}] for text in texts]),
            "view": pa.array(texts, pa.string_view()),
        }
    )
    out = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, batch.schema) as writer:
        writer.write_batch(batch)
    return out.getvalue()


def _parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), out)
    return out.getvalue()


def _csv() -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([["instruction", "input", "output"], ["a", 'b "c"\nd', "é"], ["x", "", "y"]])
    return out.getvalue().encode()


def _safetensors() -> bytes:
    header = json.dumps(
        {
            "x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "__metadata__": {"a": "b"},
        }
    )
    return struct.pack("<Q", len(header)) + header.encode() + b"\0" * 16


_MANIFEST = json.dumps(
    {
        "step": 1,
        "files": {"a.txt": {"size": 1, "xxh3_128": "00"}, "b/c": {"size": 2, "xxh3_128": ""}},
    }
)
_ADAPTER = json.dumps(
    {"peft_type": "LORA", "r": 8, "rank_pattern": {r".*\.q_proj": 4}, "target_modules": ["q_proj"]}
)

#: Reader -> what reads it, and right files to begin with.
READERS: dict[str, tuple[Callable[[Path, bytes], None], list[bytes]]] = {
    "JSON lines": (_read_rows("jsonl", "a.jsonl"), ["\n".join(map(json.dumps, ROWS)).encode()]),
    "JSON": (
        _read_rows("json", "a.json"),
        [json.dumps(ROWS, indent=1).encode(), json.dumps({"rows": ROWS}).encode()],
    ),
    "CSV": (_read_rows("csv", "a.csv"), [_csv()]),
    "hostfile": (_read_hostfile, [b"# ours\nnode-a slots=8\n10.0.0.3 slots=1 # x\n"]),
    "Slurm": (_read_slurm, [b"gpu[01-03,07],big5", b"4(x2),3", b"rack[1-2]n[1-4]"]),
    "safetensors": (_read_header, [_safetensors()]),
    "manifest": (_read_manifest, [_MANIFEST.encode()]),
    "adapter": (_read_adapter, [_ADAPTER.encode()]),
    "ZeRO": (_read_zero, [_zero_files()[0]]),
}
#: The same for readers in C++, which may end the process.
NATIVE_READERS: dict[str, tuple[Callable[[Path, bytes], None], list[bytes]]] = {
    "Arrow": (_read_rows("arrow", "a.arrow"), [_arrow(True), _arrow(False)]),
    "Parquet": (_read_rows("parquet", "a.parquet"), [_parquet()]),
}
#: What stands in files that are made to hurt.
_PARTS = [
    b"[" * 300,
    b'{"a":' * 300,
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"-",
    b"=",
    b"9" * 400,
    b"NaN",
    b"Infinity",
    b"1e999",
    b"\\ud800",
    b'"',
    b"'",
    b"\r",
    b"\n\n",
    b"..",
    b"../",
    b"/",
    b"~",
    b"\x1b[2J",
    b"\xe2\x80\xa8",
    b"null",
    b"true",
    b"[]",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
    b"(x999999999)",
    b"[1-999999999]",
    b"-oProxyCommand=x",
    b"(a+)+",
    b"{}",
    b"]",
    b"}",
    b",",
    b":",
    b"\xf0\x9f\x92\xa9",
    b"c__builtin__\neval\n",
    b"R",
    b"\x80\x04",
    b"0",
    b".",
]


def changed(files: list[bytes]) -> st.SearchStrategy[bytes]:
    """A right file with bytes changed, put in, repeated, left out or cut off; now and then anything
    at all.
    """
    change = st.tuples(
        st.sampled_from(["put", "over", "drop", "cut", "double"]),
        st.integers(0, max(map(len, files))),
        st.one_of(st.sampled_from(_PARTS), st.binary(min_size=1, max_size=8)),
    )
    mended = st.tuples(st.sampled_from(files), st.lists(change, min_size=1, max_size=6)).map(
        lambda pair: _apply(*pair)
    )
    return st.one_of(mended, mended, mended, st.binary(max_size=400))


def _apply(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for what, place, part in changes:
        before, behind = content[:place], content[place:]
        content = {
            "put": before + part + behind,
            "over": before + part + behind[len(part) :],
            "drop": before + behind[len(part) :],
            "cut": before or part,
            "double": before + behind[:64] + behind,
        }[what]
    return content


def read_one(reader: Callable[[Path, bytes], None], content: bytes) -> bool:
    """Whether the reader took it; all that it may do otherwise is to say what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "mp_rank_00_model_states.pt").write_bytes(_MODEL_STATES)
        try:
            reader(place, content)
        except LlmtuneError:
            return False
        finally:
            assert not (place / "ran").exists()
    return True


_MODEL_STATES = _zero_files()[1]


def main() -> None:
    """In a process of its own: read contents from standard input, each behind its length, and say
    so.
    """
    reader = NATIVE_READERS[sys.argv[1]][0]
    while length := sys.stdin.buffer.read(4):
        content = sys.stdin.buffer.read(struct.unpack("<I", length)[0])
        try:
            answer = "read" if read_one(reader, content) else "refused"
        except BaseException as error:
            answer = f"raised {type(error).__name__}: {error}".replace("\n", " ")
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
