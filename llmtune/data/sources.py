"""Files and built-in sources, read row by row with their place: JSONL, JSON, CSV, Parquet, ``stdlib_docs``."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmtune.config.schema import DataFormat
from llmtune.data.conversation import Conversation
from llmtune.data.formats import FORMATS, Row, detect_format
from llmtune.data.stdlib_docs import read_stdlib_docs
from llmtune.errors import DataError

BUILTIN: dict[str, Callable[[], list[Conversation]]] = {"stdlib_docs": read_stdlib_docs}


def read_source(source: str, data_format: DataFormat, seed: int) -> list[Conversation]:
    """All conversations of one source; ``name@N`` takes N of them, drawn with ``seed``.

    Raises:
        DataError: The file is missing, empty, broken, or a row has not the fields of its format.
    """
    match = re.fullmatch(r"(.+)@(\d+)", source)
    name, limit = (match[1], int(match[2])) if match else (source, None)
    conversations = BUILTIN[name]() if name in BUILTIN else _read_file(Path(name).expanduser(), data_format)
    if limit is not None and limit < len(conversations):
        conversations = random.Random(seed).sample(conversations, limit)
    return conversations


def _read_file(path: Path, data_format: DataFormat) -> list[Conversation]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        built_in = ", ".join(BUILTIN)
        raise DataError(f"{path}: unknown kind of file; data.train takes {known}, or the built-in {built_in}")
    if not path.is_file():
        raise DataError(f"{path}: no such file (data.train and data.eval are relative to the current folder)")
    conversations = []
    for row, where in reader(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row must be an object with named fields, not {type(row).__name__}")
        if data_format is DataFormat.auto:
            data_format = detect_format(row, where)
        conversations.append(FORMATS[data_format](row, where))
    if not conversations:
        raise DataError(f"{path}: the file has no rows")
    return conversations


def _read_jsonl(path: Path) -> Iterator[tuple[Row, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield _parse_json(line, f"{path}:{number}"), f"{path}:{number}"


def _read_json(path: Path) -> Iterator[tuple[Row, str]]:
    text = _read_text(path)
    rows = _parse_json(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list of rows, not {type(rows).__name__}; one object a line is .jsonl")
    for number, row in enumerate(rows):
        yield row, f"{path}[{number}]"


def _read_csv(path: Path) -> Iterator[tuple[Row, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row:
                    raise DataError(f"{path}:{reader.line_num}: more columns than the header names")
                yield row, f"{path}:{reader.line_num}"
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(path, error)) from error
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[Row, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that pyarrow reads ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(rows):
        yield row, f"{path}[{number}]"


READERS: dict[str, Callable[[Path], Iterator[tuple[Row, str]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, error)) from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    line = path.read_bytes()[: error.start].count(b"\n") + 1
    return f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        column = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(
            f"{where}: broken JSON at {column}: {error.msg}: {text[max(0, error.pos - 20) : error.pos + 20]!r}"
        ) from error
