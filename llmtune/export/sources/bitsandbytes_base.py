"""The dequantized tensors of a base that is stored in bitsandbytes' 4 bits, as a stream."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.sources.nf4 import dequantize, quantized_names
from llmtune.export.sources.tensor_source import SafetensorsSource, TensorSource
from llmtune.model.nf4.nf4_slices import load_bitsandbytes
from llmtune.storage.plain_json import parse_json
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.units import some

_STATE_NAME = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_REQUIRED = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")


def open_base(folder: Path) -> TensorSource:
    """Open the plain tensors of a model folder, dequantized where they are in 4 bits.

    Raises:
        ExportError: It is quantized in another way, or something is missing or damaged.
    """
    return SafetensorsSource(folder) if _method(folder) is None else Bnb4bitSource(folder)


def check_plain_or_4bit(folder: Path) -> None:
    """Refuse weights in other quantizations, whose bytes would be read as plain numbers.

    Raises:
        ExportError: It names the next step.
    """
    method = _method(folder)
    if method in (None, "bitsandbytes 4-bit"):
        return
    cure = "name the model that it was quantized from with base="
    if method == "bitsandbytes 8-bit":
        cure += (
            ", or store it with transformers:"
            " from_pretrained(...).dequantize().save_pretrained(...)"
        )
    raise ExportError(
        f"{folder / 'config.json'}: the weights are quantized ({method}); exported can be plain"
        f" weights and bitsandbytes 4-bit: {cure}"
    )


class Bnb4bitSource:
    """The dequantized tensors of a 4-bit folder, in the dtype that they were quantized from."""

    def __init__(self, folder: Path) -> None:
        """Read the dtype and shape of each tensor; none is dequantized yet.

        Raises:
            ExportError: The folder is quantized in another way, or a tensor's statistics are
                missing or damaged.
        """
        check_plain_or_4bit(folder)
        self.folder = folder
        self._stored = SafetensorsSource(folder)

        # Packed weight -> the tensor that describes its quantization.
        self._states = {
            match["weight"]: name
            for name in self._stored.specs
            if (match := _STATE_NAME.fullmatch(name)) is not None
        }
        self._check_statistics()
        columns = quantized_names(folder, self._stored) if self._states else {}
        self._transposed = {name: columns.get(name, False) for name in self._states}

        # The tensors of the plain model: statistics belong to their weight.
        statistics = {
            f"{weight}.{part}" for weight in self._states for part in (*_REQUIRED, *_NESTED)
        }
        self.specs = {
            name: self._plain_spec(name) if name in self._states else spec
            for name, spec in self._stored.specs.items()
            if name not in statistics and not _STATE_NAME.fullmatch(name)
        }

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield dequantized rows; of other tensors, views of the file's own bytes."""
        if name not in self._states:
            yield from self._stored.blocks(name)
            return
        parts = {
            part: self._stored.tensor(f"{name}.{part}")
            for part in (*_REQUIRED, *_NESTED, self._states[name].removeprefix(f"{name}."))
            if f"{name}.{part}" in self._stored.specs
        }
        try:
            state = load_bitsandbytes().QuantState.from_dict(parts, torch.device("cpu"))
        except (KeyError, ValueError, AssertionError) as error:
            raise ExportError(
                f"{self.folder}: the statistics of {name} are damaged ({error!r}); fetch it again"
            ) from error
        yield from dequantize(self._stored.tensor(name), state, self._transposed[name])

    def _check_statistics(self) -> None:
        """Check that every packed weight has its statistics, and the other way round."""
        # What each packed weight needs.
        required: list[str] = []
        for weight in self._states:
            required += [weight, *(f"{weight}.{part}" for part in _REQUIRED)]
        missing = [name for name in required if name not in self._stored.specs]
        if missing:
            raise ExportError(
                f"{self.folder}: 4-bit weights are incomplete without {some(missing)}; fetch or"
                " copy it again"
            )

        # What looks packed, and is not described.
        without_state = [
            name
            for name, spec in self._stored.specs.items()
            if name not in self._states and spec.dtype == torch.uint8 and name.endswith(".weight")
        ]
        if without_state:
            raise ExportError(
                f"{self.folder}: {some(without_state)} are packed in 4 bits and have no"
                " quant_state; store the model again with bitsandbytes 0.41.3 or newer"
            )

    def _plain_spec(self, name: str) -> TensorSpec:
        try:
            about = parse_json(bytes(self._stored.tensor(self._states[name]).tolist()))
            shape, dtype = tuple(about["shape"]), getattr(torch, about["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(
                f"{self.folder}: {self._states[name]} is damaged ({error!r}); fetch it again"
            ) from error
        return TensorSpec(name, dtype, shape[::-1] if self._transposed[name] else shape)


def _method(folder: Path) -> str | None:
    """Return the quantization of ``config.json``; None for plain weights."""
    file = folder / "config.json"
    try:
        settings: Any = (
            parse_json(file.read_text()).get("quantization_config") if file.is_file() else None
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{file} cannot be read ({error}); fetch or copy it again") from error
    if not settings:
        return None
    in_4bit = bool(settings.get("load_in_4bit"))
    in_8bit = bool(settings.get("load_in_8bit"))
    default = "bitsandbytes" if in_4bit or in_8bit else "unknown"
    method = str(settings.get("quant_method") or default)
    if method != "bitsandbytes":
        return method
    return f"bitsandbytes {'8' if in_8bit else '4'}-bit"
