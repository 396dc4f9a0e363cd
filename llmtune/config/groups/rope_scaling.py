"""``model.rope_scaling``: the kinds of scaled rotary positions, their keys, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from llmtune.config.nearest import nearest

#: ``rope_type`` of transformers -> its keys beside ``rope_type`` and ``factor``, with the values of
#: transformers' ``modeling_rope_utils.py`` where they are left out.
KINDS: dict[str, dict[str, float | None]] = {
    "linear": {},
    "yarn": {"beta_fast": None, "beta_slow": None, "attention_factor": None},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}

#: Architectures whose ``max_position_embeddings`` counts the positions behind a linear scaling.
COUNTS_SCALED = ("gemma3_text",)

#: Kinds of transformers that are refused -> why.
_REFUSED = {
    "dynamic": (
        "its frequencies follow the longest row that the model has seen, so that a row's loss would"
        " depend on the rows before it, and a resumed run would go on otherwise"
    ),
    "longrope": "it needs a factor for every frequency, which are found by a search",
}


def find_rope_problems(scaling: dict[str, Any]) -> Iterator[str]:
    """Find what is wrong with ``model.rope_scaling`` by itself.

    Args:
        scaling: ``rope_type``, ``factor`` and the kind's own keys; without any key, positions stay.
    """
    if not scaling:
        return
    shown = f"model.rope_scaling={scaling}"
    kinds = ", ".join(KINDS)
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in KINDS:
        reason = f"rope_type={kind} is not taken: {_REFUSED[kind]}; " if kind in _REFUSED else ""
        yield f"{shown}: {reason}rope_type is one of {kinds}, as in {{rope_type: yarn, factor: 2}}"
        return
    known = ("rope_type", "factor", *KINDS[kind])
    listed = ", ".join(known)
    for key in scaling:
        if key not in known:
            hint = nearest(str(key), set(known)) or f": its keys are {listed}"
            yield f"{shown}: rope_type={kind} has no key {key}{hint}"
    factor = scaling.get("factor")
    if not _is_number(factor) or not 1 < float(str(factor)) < math.inf:
        yield f"{shown}: factor must be a number above 1, by which positions are multiplied"
    for key in KINDS[kind]:
        value = scaling.get(key, 1.0)
        if not _is_number(value) or not 0 < float(value) < math.inf:
            yield f"{shown}: {key} must be a number above 0"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
