"""Find the fonts that draw a text, whatever script it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

#: matplotlib's own font, which is always there.
_DEFAULT = "DejaVu Sans"
#: Families that hold one font for most scripts, from the best looking on.
_PREFERRED = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
)


def find_families(texts: Sequence[str]) -> list[str]:
    """Find the families of fonts of this machine that together draw texts, the first one first.

    Returns:
        matplotlib's own, and behind it those that each draw more of what is left. Characters that
        no font has are still left: :func:`can_draw`.
    """
    families = [_DEFAULT]
    missing = frozenset("".join(texts)) - _drawn(_DEFAULT, frozenset("".join(texts)))
    for family in _other_families() if missing else ():
        drawn = _drawn(family, missing)
        if drawn:
            families.append(family)
            missing -= drawn
        if not missing:
            break
    return families


def can_draw(text: str, families: Sequence[str]) -> bool:
    """Tell whether fonts have all characters of a text."""
    missing = frozenset(text)
    for family in families:
        missing -= _drawn(family, missing)
    return not missing


@cache
def _drawn(family: str, characters: frozenset[str]) -> frozenset[str]:
    """Return which characters the plain font of a family has."""
    from matplotlib.font_manager import get_font

    font = get_font(_plain_fonts()[family])
    # A font of bitmaps, such as those of colored emoji, has one size, and is refused any other.
    if not font.scalable:
        return frozenset()
    return frozenset(letter for letter in characters if font.get_char_index(ord(letter)))


@cache
def _plain_fonts() -> dict[str, str]:
    """List the families of this machine, with the file of each one's upright font of normal weight.

    Another weight in its place would make matplotlib print a warning.
    """
    from matplotlib.font_manager import fontManager

    return {
        font.name: font.fname
        for font in fontManager.ttflist
        if (font.style, font.weight, font.stretch) == ("normal", 400, "normal")
        # Comes with matplotlib, and has a box for every character.
        and not font.name.startswith("Last Resort")
    }


def _other_families() -> list[str]:
    """List the families beside matplotlib's own: the preferred ones, then the others by name."""
    families = _plain_fonts().keys() - {_DEFAULT}
    preferred = [family for family in _PREFERRED if family in families]
    return [*preferred, *sorted(families.difference(preferred))]
