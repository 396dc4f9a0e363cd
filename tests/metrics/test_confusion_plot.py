"""The picture of a table is drawn for any number of classes and any names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmtune.metrics import fonts
from llmtune.metrics.confusion import ConfusionTable, TableKind
from llmtune.metrics.confusion_plot import draw_confusion
from llmtune.metrics.fonts import can_draw, find_families


def table(names: list[str], kind: TableKind = TableKind.CLASSES) -> ConfusionTable:
    size = len(names)
    shape = {
        TableKind.CLASSES: (size, size),
        TableKind.LABELS: (size, 2, 2),
        TableKind.ENTITIES: (size, 3),
    }[kind]
    counts = np.arange(np.prod(shape)).reshape(shape) % 7
    if kind is TableKind.ENTITIES:
        counts = np.sort(counts)
    nested = counts.tolist()
    rows = tuple(
        tuple(tuple(cell) if isinstance(cell, list) else cell for cell in row) for row in nested
    )
    return ConfusionTable(kind=kind, names=tuple(names), counts=rows)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", TableKind)
@pytest.mark.parametrize("size", [1, 2, 8, 26, 100])
def test_any_number_of_classes_is_drawn_within_bounds(
    kind: TableKind, size: int, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    assert draw_confusion(table([f"name {index}" for index in range(size)], kind), picture)
    with Image.open(picture) as image:
        assert min(image.size) >= 300
        assert max(image.size) <= 1700
        assert image.info.get("Software") is None
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "names",
    [
        ["体育", "财经"],
        ["体育", "sports"],
        # One is a formula, and the other a wrong one.
        ["$x^2$", r"$\frac$"],
        ["", " "],
        ["a\nb", "\x00\x1b[31m"],
        ["\ud800", "😀"],
        ["long " * 200, "ไทย"],
        ["same", "same"],
    ],
)
def test_any_names_are_drawn_without_a_warning(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert draw_confusion(table(names), tmp_path / "picture.png")
    assert caplog.records == []


def test_the_same_table_makes_the_same_bytes(tmp_path: Path) -> None:
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        draw_confusion(table(["a", "b", "c"]), picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_table_without_classes_is_not_drawn(tmp_path: Path) -> None:
    assert not draw_confusion(ConfusionTable.of_tags([], []), tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_names_that_no_font_has_are_shown_by_their_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"DejaVu Sans": fonts._plain_fonts()["DejaVu Sans"]}
    monkeypatch.setattr(fonts, "_plain_fonts", lambda: plain)
    fonts._drawn.cache_clear()
    families = find_families(["体育", "abc"])
    assert families == ["DejaVu Sans"]
    assert not can_draw("体育", families)
    assert can_draw("abc é", families)
    pictures = [tmp_path / "chinese.png", tmp_path / "other.png", tmp_path / "latin.png"]
    for picture, names in zip(
        pictures, (["体育", "财经"], ["房产", "时政"], ["a", "b"]), strict=True
    ):
        draw_confusion(table(names), picture)
    chinese, other, latin = (picture.read_bytes() for picture in pictures)
    assert chinese == other
    assert chinese != latin


def test_a_second_font_draws_what_the_first_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"DejaVu Sans": "abc", "Other": "ac体", "SimHei": "体育", "Unneeded": "育"}
    monkeypatch.setattr(fonts, "_plain_fonts", lambda: dict.fromkeys(has, ""))
    monkeypatch.setattr(fonts, "_drawn", lambda family, letters: letters & frozenset(has[family]))
    assert find_families(["abc"]) == ["DejaVu Sans"]
    assert find_families(["a体", "育"]) == ["DejaVu Sans", "SimHei"]
    assert can_draw("a体育", ["DejaVu Sans", "SimHei"])
    assert not can_draw("a?", find_families(["a?"]))


def test_boxes_for_missing_characters_count_as_no_font() -> None:
    assert not any(family.startswith("Last Resort") for family in fonts._plain_fonts())
    assert not can_draw("\ud800", find_families(["\ud800"]))
