"""Read a file that is JSON as a whole: a list, an object around one, or objects over several lines.

JSON lines are told apart by the first line: where it is a whole object, and no object around a list
of rows, each line is one row, and a broken line does not affect the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llmtune.data.formats.format import has_marks
from llmtune.data.read.sources import Source
from llmtune.data.rows.fields import refuse_changing_fields
from llmtune.data.rows.json_objects import decode_json, describe_broken, parse_json
from llmtune.data.rows.problems import RowError, short
from llmtune.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_AROUND = re.compile(rb'\s*\{\s*"[^"]*"\s*:\s*(\[\s*\{|["0-9])')
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def is_whole(begin: bytes) -> bool:
    """Tell whether a file is JSON as a whole, and no JSON lines.

    Args:
        begin: Its first bytes: all of the first line where :func:`may_be_around_rows` says so, or a
            million.
    """
    first, _, rest = begin.removeprefix(_BOM).lstrip().partition(b"\n")
    first = first.strip()
    if not first.startswith(b"{"):
        return first.startswith(b"[")
    try:
        row = parse_json(first)
    except UnicodeDecodeError:
        return False
    except ValueError:
        # Either the line is broken, or an object covers several lines: then the next line continues
        # with a field, or ends the object.
        return first == b"{" or rest.lstrip()[:1] in {b'"', b"}", b"]", b","}
    return not rest.strip() and bool(_lists_of_rows(row, None))


def may_be_around_rows(begin: bytes) -> bool:
    """Tell whether all of the first line is needed: it may be an object around a list of rows.

    It is not where the fields at its beginning already make it a row: a first row of many
    megabytes is then not parsed for this question.

    Args:
        begin: The first bytes of a file.
    """
    begin = begin.removeprefix(_BOM)
    if _AROUND.match(begin) is None or b"\n" in begin:
        return False
    return not has_marks(dict.fromkeys(_first_fields(begin.decode("utf-8", "ignore"))))


def is_around_rows(line: bytearray) -> bool:
    """Tell whether a first line of more than a million bytes is an object around a list of rows.

    Args:
        line: Without its end. It is emptied, so that it does not stay in memory beside its values.
    """
    try:
        text = line.decode("utf-8", "surrogatepass")
        line.clear()
        row = parse_json(text.removeprefix("\ufeff"))
    except ValueError:
        # Not UTF-8, or broken JSON.
        return False
    return bool(_lists_of_rows(row, None))


def find_rows(path: str, text: str, source: Source) -> Iterator[tuple[int, Any]]:
    """Yield rows with the lines on which they begin.

    Raises:
        DataError: The file is no JSON; of several lists in an object it cannot be told which holds
            the rows; or a field beside them would change what is learned.
    """
    begin = _skip(text, 0, _SPACE)
    line = 1 + text.count("\n", 0, begin)
    if text[begin : begin + 1] == "[":
        yield from _list_items(path, text, begin, line, whole_file=True)
        return
    if text[begin : begin + 1] != "{":
        raise DataError(
            f"{path}:1: must hold a list of rows, or one row per line,"
            f" not {text[begin : begin + 20]!r}"
        )

    # One object around a list of rows; fields beside the list must not change what is learned.
    first, end = _decode(path, text, begin, line)
    if _skip(text, end, _SPACE) == len(text) and (lists := _lists_of_rows(first, source)):
        chosen = _choose(path, line, lists, source)
        try:
            refuse_changing_fields(
                {name: value for name, value in first.items() if name not in lists}
            )
        except RowError as error:
            raise DataError(f"{path}:{line}: beside the rows in {chosen!r}, {error}") from error
        at = _find_field(text, begin, chosen)
        yield from _list_items(path, text, at, 1 + text.count("\n", 0, at), whole_file=False)
        return

    # Else one object after the other, each over any number of lines.
    position = begin
    while position < len(text):
        row, end = _decode(path, text, position, line)
        yield line, row
        following = _skip(text, end, _BETWEEN)
        line += text.count("\n", position, following)
        position = following


def _lists_of_rows(row: Any, source: Source | None) -> list[str]:
    """List the fields of an object that hold lists of rows; none where the object is a row."""
    if not isinstance(row, dict):
        return []
    named = set(source.fields.values()) if source else set()
    if row.keys() & named or has_marks(row):
        return []
    return [
        name
        for name, value in row.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]


def _choose(path: str, line: int, lists: list[str], source: Source) -> str:
    if len(lists) == 1:
        return lists[0]
    if source.split in lists:
        return source.split
    raise DataError(
        f"{path}:{line}: the object has lists of rows in {', '.join(map(repr, lists))}; say which"
        f" with split: {short(lists[0])} of the source"
    )


def _find_field(text: str, begin: int, name: str) -> int:
    """Find the position of a field's value in the complete object that begins at ``begin``."""
    position = begin + 1
    while True:
        position = _skip(text, position, _BETWEEN)
        key, position = decode_json(text, position)
        position = _skip(text, _skip(text, position, _SPACE) + 1, _SPACE)
        if key == name:
            return position
        _, position = decode_json(text, position)


def _first_fields(text: str) -> Iterator[str]:
    """Yield the names of the fields of an object, of which the text holds only the beginning."""
    position = text.index("{") + 1
    while True:
        position = _skip(text, position, _BETWEEN)
        try:
            name, position = decode_json(text, position)
            position = _skip(text, position, _SPACE)
            if not isinstance(name, str) or text[position : position + 1] != ":":
                return
            yield name
            _, position = decode_json(text, _skip(text, position + 1, _SPACE))
        except ValueError:
            # The value is cut off here, or broken.
            return


def _list_items(
    path: str, text: str, begin: int, line: int, whole_file: bool
) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON list with the lines on which they begin."""
    position = begin + 1
    before = begin
    while True:
        position = _skip(text, position, _BETWEEN)
        line += text.count("\n", before, position)
        if text[position : position + 1] == "]":
            break
        row, end = _decode(path, text, position, line)
        yield line, row
        before, position = position, end
    if whole_file and (rest := text[position + 1 :].strip()):
        raise DataError(
            f"{path}:{line}: there is text after the list: {rest[:20]!r}; a file of one"
            " object per line is .jsonl"
        )


def _decode(path: str, text: str, position: int, line: int) -> tuple[Any, int]:
    try:
        return decode_json(text, position)
    except json.JSONDecodeError as error:
        at = text.count("\n", 0, error.pos) + 1
        raise DataError(f"{path}:{at}: {describe_broken(error)}") from error
    except ValueError as error:
        raise DataError(f"{path}:{line}: broken JSON: {error}") from error


def _skip(text: str, position: int, what: re.Pattern[str]) -> int:
    match = what.match(text, position)
    return match.end() if match else position
