"""Scale a model's rotary positions as ``model.rope_scaling`` asks, so that it takes longer rows.

The formulas are those of transformers (``modeling_rope_utils.py``): ``linear`` divides every
frequency by the factor (https://arxiv.org/abs/2306.15595), ``yarn`` only the low ones and scales
the logits of attention (https://arxiv.org/abs/2309.00071), and ``llama3`` the low ones as Llama 3.1
does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from llmtune.config.nearest import nearest
from llmtune.errors import ConfigError, first_line

#: Kinds of rotary positions that look at the length of the row, of which a rank has only a part.
_DYNAMIC = ("dynamic", "longrope")

#: ``rope_type`` of transformers -> its keys beside ``rope_type`` and ``factor``, with the values of
#: transformers' ``modeling_rope_utils.py`` where they are left out.
KINDS: dict[str, dict[str, float | None]] = {
    "linear": {},
    "yarn": {"beta_fast": None, "beta_slow": None, "attention_factor": None},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}

#: Kinds of transformers that are refused -> why.
_REFUSED = {
    "dynamic": (
        "its frequencies follow the longest row that the model has seen, so that a row's loss would"
        " depend on the rows before it, and a resumed run would go on otherwise"
    ),
    "longrope": "it needs a factor for every frequency, which are found by a search",
}

#: The layers that are scaled where a model has a rotation for each kind of layer. The others attend
#: to a window, within which no distance grows.
_WHOLE_ROW = "full_attention"

#: Architectures whose ``max_position_embeddings`` counts the positions behind a linear scaling.
COUNTS_SCALED = ("gemma3_text",)

_OWN_KEYS = ("max_position_embeddings", "rope_parameters")


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


def is_scalable(text: Any) -> bool:
    """Tell whether the positions of a text model's configuration can be scaled."""
    return _find_refusal(text) is None


def scale_positions(architecture: Any, scaling: dict[str, Any], name: str) -> None:
    """Scale the rotary positions of a transformers configuration, in place.

    Args:
        scaling: ``model.rope_scaling``, which has been checked; an empty one changes nothing.
        name: The model's name in the message.

    Raises:
        ConfigError: The architecture has no rotary positions, they are scaled already, or it does
            not take this kind.
    """
    if not scaling:
        return
    if problems := list(find_rope_problems(scaling)):
        raise ConfigError("; ".join(problems))
    text = architecture.get_text_config()
    refusal = _find_refusal(text)
    if refusal is not None:
        raise ConfigError(
            f"model.rope_scaling={scaling}: {name} ({text.model_type}) {refusal}; leave"
            " model.rope_scaling out"
        )
    kind, factor = str(scaling["rope_type"]), float(scaling["factor"])
    known = int(text.max_position_embeddings)
    given = {key: float(scaling.get(key, value) or 0) for key, value in KINDS[kind].items()}
    added: dict[str, Any] = {"rope_type": kind, "factor": factor}
    added |= {key: value for key, value in given.items() if value}
    if kind != "linear":
        added["original_max_position_embeddings"] = known
    rope = deepcopy(dict(text.rope_parameters))
    if nested := text.nested_rope_parameter_keys(rope):
        rope |= {_WHOLE_ROW: {**rope[_WHOLE_ROW], **added}} if _WHOLE_ROW in nested else {}
    else:
        rope |= added
    text.rope_parameters = rope
    # Of linear scaling, transformers and others multiply this number by the factor.
    if kind != "linear" or text.model_type in COUNTS_SCALED:
        text.max_position_embeddings = round(factor * known)
    _check_readable(text, scaling, name)


def _check_readable(text: Any, scaling: dict[str, Any], name: str) -> None:
    """Check that a scaled configuration that is stored is read again with the same positions.

    Raises:
        ConfigError: The architecture takes fewer kinds, or other keys.
    """
    stored = text.to_dict()
    stored.pop("model_type", None)
    reason = "its config.json would not keep it"
    try:
        rope = type(text)(**stored).rope_parameters
        entry = rope.get(_WHOLE_ROW, rope)
        if (entry["rope_type"], entry["factor"]) == (scaling["rope_type"], scaling["factor"]):
            return
    except Exception as error:
        # Architectures check their keys in their own ways.
        reason = first_line(error)
    raise ConfigError(
        f"model.rope_scaling={scaling}: {name} ({text.model_type}) does not take it ({reason});"
        " leave model.rope_scaling out"
    )


def changed_settings(architecture: Any) -> dict[str, Any]:
    """Return the keys of a text model's configuration that :func:`scale_positions` sets."""
    text = architecture.get_text_config()
    return {key: getattr(text, key) for key in _OWN_KEYS}


def check_scaled(model: Any, scaling: dict[str, Any], name: str) -> None:
    """Check that a model computes the positions that its configuration asks for.

    Args:
        model: Built from the scaled configuration, on any device.

    Raises:
        ConfigError: No module has frequencies of that kind, so that nothing would be scaled.
    """
    if not scaling:
        return
    kind = scaling["rope_type"]
    for module in model.modules():
        used = getattr(module, "rope_type", None)
        if used == kind or (isinstance(used, dict) and kind in used.values()):
            return
    raise ConfigError(
        f"model.rope_scaling={scaling}: transformers computes the rotary positions of {name} in"
        " its own way, and would not scale them; leave model.rope_scaling out"
    )


def describe_scaling(scaling: dict[str, Any], positions: int | None) -> str | None:
    """Say in one line how positions are scaled; None where they are not."""
    if not scaling:
        return None
    reach = "" if positions is None else f" up to {positions:,} tokens"
    return (
        f"rotary positions: scaled ({scaling['rope_type']}, factor {scaling['factor']}){reach}, by"
        " model.rope_scaling; the published config.json says so too"
    )


def _find_refusal(text: Any) -> str | None:
    """Say why positions cannot be scaled; None where they can."""
    rope = getattr(text, "rope_parameters", None)
    positions = getattr(text, "max_position_embeddings", None)
    if not rope or not isinstance(positions, int):
        return "has no rotary positions that its config.json describes"
    nested = text.nested_rope_parameter_keys(rope)
    if nested and not rope.get(_WHOLE_ROW):
        return f"has rotary positions for {', '.join(nested)}, and none for {_WHOLE_ROW}"
    kind = (rope[_WHOLE_ROW] if nested else rope).get("rope_type", "default")
    if kind != "default":
        return f"has rotary positions that are scaled already ({kind})"
    return None


def has_dynamic_positions(text: Any) -> bool:
    """Tell whether rotary positions of a transformers configuration depend on the row's length."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    return any(kind.get("rope_type", kind.get("type")) in _DYNAMIC for kind in kinds)
