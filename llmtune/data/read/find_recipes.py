"""Find the recipes by which the files of a source are read."""

from __future__ import annotations

from llmtune.config.groups.data import AUTO
from llmtune.data.formats.format import detect_format
from llmtune.data.formats.recipe import Recipe
from llmtune.data.read.blocks import parse_rows
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import DataFile, Source
from llmtune.data.rows.fields import without_fields
from llmtune.data.rows.problems import RowError, format_location
from llmtune.data.rows.values import rename
from llmtune.errors import DataError


def find_recipes(source: Source, files: list[DataFile]) -> dict[str, Recipe]:
    """Find the recipe of each file that has rows, by its path.

    Raises:
        DataError: A file cannot be read, its format cannot be told, or there is no row at all.
    """
    recipes = {file.path: recipe for file in files if (recipe := find_recipe(source, file))}
    if not recipes:
        described = "the file has no rows" if len(files) == 1 else "no file has rows"
        raise DataError(f"{source.path}: {described}")
    return recipes


def find_recipe(source: Source, file: DataFile) -> Recipe | None:
    """Find the recipe of a file; None for a file without rows.

    ``auto`` looks at the first row that can be parsed.

    Raises:
        DataError: The format cannot be told, or no row can be parsed.
    """
    broken: str | None = None
    for block in read_blocks(file, source):
        for line, row in parse_rows(block):
            where = format_location(file.path, line)
            if isinstance(row, RowError):
                broken = broken or f"{where}: {row}"
                continue
            ignore = frozenset(source.ignore)
            if source.format != AUTO:
                return Recipe(source.format, source.fields, ignore)
            try:
                read = rename(without_fields(row, ignore), source.fields)
                return Recipe(detect_format(read).name, source.fields, ignore)
            except RowError as error:
                raise DataError(f"{where}: {error}") from error
    if broken:
        raise DataError(f"{broken} (and no other row of the file can be read)")
    return None
