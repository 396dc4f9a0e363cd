"""Quantized base models: the names of their tensors, and what can be trained on them.

A quantizer stores a weight as several tensors: its packed values, and the scales that they are
multiplied with. Where their names are known, the files are compared with the model by the names of
the weights that they represent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.errors import ConfigError
from llmtune.model.weights.files import Entry
from llmtune.storage.plain_json import parse_json

#: ``quant_method`` of quantizers whose names are known -> the key of its settings that names a
#: layout, and the known ones.
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "bitsandbytes": ("", ()),
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2")),
    "awq": ("version", ("gemm", "gemv", "exllama")),
    "compressed-tensors": ("format", ("pack-quantized", "int-quantized", "naive-quantized")),
}

#: Endings of tensors that hold the values of a weight, if they are not called ``weight``.
_PACKED = re.compile(r"\.(qweight|weight_packed)$")

#: Endings of tensors that say how a weight is packed: bitsandbytes' in 4 and in 8 bits, GPTQ's and
#: AWQ's, compressed-tensors'.
_BESIDE = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$|\.(SCB|weight_format)$|"
    r"\.(qzeros|scales|g_idx)$|\.(weight|input|output|k|v|q)_(scale|zero_point|shape|g_idx|global_scale)$"
)

#: Types whose values mean nothing without scales.
_INTEGERS = ("I8", "U8", "I16", "I32", "I64")
_SMALL_FLOATS = ("F8_E4M3", "F8_E5M2")


def quantization(folder: Path) -> dict[str, Any] | None:
    """Read ``quantization_config`` of a model folder's ``config.json``; None if it has none."""
    settings = parse_json((folder / "config.json").read_bytes()).get("quantization_config")
    return dict(settings) if settings else None


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the quantizer's name; old files of bitsandbytes do not state it."""
    old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if old else "an unknown quantizer"))


def has_known_names(settings: Mapping[str, Any]) -> bool:
    """Tell whether the names that a quantizer uses are known here."""
    if method_of(settings) not in _KNOWN:
        return False
    key, layouts = _KNOWN[method_of(settings)]
    return settings.get(key) is None or str(settings[key]).lower() in layouts


def weight_entries(stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors that hold values of weights, by the names of those weights."""
    return {
        _PACKED.sub(".weight", name): entry
        for name, entry in stored.items()
        if not _BESIDE.search(name)
    }


def is_packed(name: str, stored: Mapping[str, Entry]) -> bool:
    """Tell whether a weight's values are packed, so that their shape is not the weight's."""
    # bitsandbytes may keep its packed bytes in tensors of any type (bnb_4bit_quant_storage).
    return name not in stored or stored[name].kind in _INTEGERS or f"{name}.absmax" in stored


def find_scaleless(stored: Mapping[str, Entry]) -> list[str]:
    """Find missing tensors without which packed values cannot be unpacked."""
    needed: list[str] = []
    for name, entry in stored.items():
        owner, _, ending = name.rpartition(".")
        if ending == "qweight":
            needed += [f"{owner}.scales", f"{owner}.qzeros"]
        elif ending == "weight_packed":
            needed.append(f"{owner}.weight_scale")
        elif ending == "weight" and entry.kind == "U8":
            needed += [f"{name}.absmax", f"{name}.quant_map"]
        elif ending == "weight" and entry.kind == "I8":
            needed += [] if f"{owner}.weight_scale" in stored else [f"{owner}.SCB"]
    return sorted(name for name in needed if name not in stored)


def find_meaningless(
    direct: Mapping[str, str], stored: Mapping[str, Entry], floating: set[str]
) -> list[str]:
    """Find weights stored as integers, or as scaled 8-bit floats, in a folder without a quantizer.

    transformers would use the packed values as the weights.

    Args:
        direct: Name in the model -> name in the files.
        floating: Names of the model's tensors that are not integers.
    """
    meaningless = []
    for name, source in sorted(direct.items()):
        kind = stored[source].kind
        scaled = any(f"{source}_scale{ending}" in stored for ending in ("", "_inv"))
        if name in floating and (kind in _INTEGERS or (kind in _SMALL_FLOATS and scaled)):
            meaningless.append(f"{name} ({kind})")
    return meaningless


def check_trainable(
    settings: Mapping[str, Any],
    stored: Mapping[str, Entry],
    tuner: str | None,
    stage: int,
    name: str,
    requantizes: bool = False,
) -> None:
    """Refuse a quantized model that cannot be trained as it is stored.

    Args:
        settings: The quantizer's.
        tuner: Name of a tuner that trains the model's own weights; None for adapters.
        stage: The ZeRO stage.
        name: The model's name in messages.
        requantizes: The tuner quantizes the model itself.

    Raises:
        ConfigError: With what can be trained instead.
    """
    method = method_of(settings)
    base = f"model.name_or_path={name}: its weights are quantized (quantization_config: {method})"
    if tuner is not None:
        raise ConfigError(
            f"{base}; tuner={tuner} could train only its norms and embeddings: take"
            " tuner=lora, or the model in 16 bits"
        )
    if any(entry.kind in _SMALL_FLOATS for entry in stored.values()) or not _is_trainable(settings):
        raise ConfigError(
            f"{base}, which cannot be trained on: store the model in 16 bits first (transformers'"
            f" from_pretrained with dequantize=True in its quantization_config, where {method} has"
            " it, then save_pretrained), and name that"
        )
    if requantizes:
        raise ConfigError(
            f"{base}, and tuner=qlora quantizes a model in 16 bits: take tuner=lora with zero=2 (or"
            " 0, 1), or the model in 16 bits"
        )
    if stage == 3:
        raise ConfigError(
            f"{base}, which ZeRO 3 cannot partition: take zero=2 (or 0, 1), or the model in 16 bits"
        )


def _is_trainable(settings: Mapping[str, Any]) -> bool:
    """Ask transformers; a quantizer whose package is missing is refused when the model is read."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        return bool(AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).is_trainable)
    except Exception:
        # Missing packages and unknown settings raise anything; loading the model will say what is
        # missing.
        return True
