"""Run a transformers model with the weights of one module at a time in memory.

They are read before the module computes and dropped after it. Plain linear layers and embeddings,
also those below LoRA's matrices, compute block by block and hold even less.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.merge.adapter import Adapter
from llmtune.export.sources.tensor_source import (
    TensorSource,
    find_name,
    is_input_embedding,
    read_whole,
)
from llmtune.export.verify.unit import Unit, UnitHook
from llmtune.model.skeleton import build_skeleton, hollow, is_hollow, tied_aliases


class StreamedModel:
    """A skeleton whose modules read their parameters in fp32 from a source while they compute."""

    def __init__(
        self,
        folder: Path,
        source: TensorSource,
        adapter: Adapter | None = None,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Build the model of ``config.json`` in ``folder``, with peft's wrappers of the adapter.

        The source must use the model's own names, see
        :func:`llmtune.export.verify.export_checks.find_tensor_mismatches`.

        Args:
            changes: Keys of ``config.json`` that are replaced.
        """
        self._source = source
        self.model = build_skeleton(folder, changes)
        settings = self.model.config.get_text_config()
        if settings.pad_token_id is None:
            # Heads that look for the last token of each text need it; no text is padded here.
            settings.pad_token_id = -1
        if adapter is not None:
            _resize(self.model, adapter)
        owners = {name: module for name, module in self.model.named_modules() if module._parameters}
        self.aliases = tied_aliases(self.model)
        _fill_buffers(self.model, source)
        if adapter is not None:
            self.model = _load_peft_adapter(self.model, adapter)
        self.model.eval()
        self.units = _units(self.model, owners)
        self._hook: UnitHook | None = None
        for unit in self.units:
            self._stream(unit)

    def logits(self, tokens: torch.Tensor, hook: UnitHook | None = None) -> torch.Tensor:
        """Run the model; the result is in fp32, shape (rows, positions, vocabulary).

        Args:
            tokens: Shape (rows, positions).
            hook: Called after every unit.
        """
        self._hook = hook
        with torch.no_grad():
            outputs = self.model(input_ids=tokens)
        # A model without a head returns its last hidden states.
        logits: torch.Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        return logits

    def run_unit(
        self, source: TensorSource, unit: Unit, arguments: tuple[Any, ...]
    ) -> torch.Tensor:
        """Run the unit's only base module with another source's weights."""
        ((name, module),) = unit.inner
        if unit.by_rows:
            return self._compute_by_rows(name, module, source, *arguments)
        before = dict(module._parameters)
        self._load(name, module, source, everything=True)
        try:
            output: torch.Tensor = module(*arguments)
        finally:
            module._parameters.update(before)
        return output

    def _load(
        self, name: str, module: Any, source: TensorSource, everything: bool = False
    ) -> list[str]:
        """Read a module's parameters, but those that the adapter has filled."""
        loaded = [
            key
            for key, old in module._parameters.items()
            if old is not None and (everything or is_hollow(old))
        ]
        for key in loaded:
            tensor = self._read(source, f"{name}.{key}")
            module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
        return loaded

    def _read(self, source: TensorSource, parameter: str) -> torch.Tensor:
        return read_whole(source, self._find(source, parameter)).float()

    def _find(self, source: TensorSource, parameter: str) -> str:
        for alias in (parameter, *self.aliases.get(parameter, ())):
            name = find_name(alias, source.specs)
            if name is not None:
                return name
        raise ExportError(f"{parameter}, which the model of config.json has, is in no file")

    def _compute_by_rows(
        self, name: str, module: Any, source: TensorSource, inputs: torch.Tensor
    ) -> torch.Tensor:
        """Run a linear layer or an embedding, with one block of the weight at a time in memory."""
        stored = self._find(source, f"{name}.weight")
        # Rounded to the stored dtype, whatever dtype the blocks come in.
        blocks = (block.to(source.specs[stored].dtype).float() for block in source.blocks(stored))
        if isinstance(module, torch.nn.Embedding):
            return _take_rows(blocks, inputs, module.embedding_dim)
        output = torch.cat([inputs @ block.T for block in blocks], dim=-1)
        return output if module.bias is None else output + self._read(source, f"{name}.bias")

    def _stream(self, unit: Unit) -> None:
        """Add hooks around the unit: load, compute, call the hook, drop."""
        skeleton: list[tuple[Any, dict[str, Any]]] = []

        def before(_module: Any, _arguments: Any) -> None:
            for name, module in unit.inner:
                skeleton.append((module, dict(module._parameters)))
                self._load(name, module, self._source)

        def after(_module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if self._hook is not None:
                self._hook(unit, arguments, output)
            while skeleton:
                module, parameters = skeleton.pop()
                module._parameters.update(parameters)

        if unit.by_rows:
            for name, module in unit.inner:
                module.forward = partial(self._compute_by_rows, name, module, self._source)
        else:
            unit.outer.register_forward_pre_hook(before)
        unit.outer.register_forward_hook(after)


def _resize(model: Any, adapter: Adapter) -> None:
    """Resize the vocabulary to that of the adapter, which stores a resized embedding."""
    keys = [
        parts.keys[part]
        for module, parts in adapter.modules.items()
        for part in ("weight", "base_weight")
        if is_input_embedding(f"{module}.weight") and part in parts.keys
    ]
    rows = max((adapter.shapes[key][0] for key in keys), default=0)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
        hollow(model)


def _load_peft_adapter(model: Any, adapter: Adapter) -> Any:
    """Add peft's wrappers, filled from the adapter; ``from_pretrained`` would look for a GPU."""
    import warnings

    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    settings = PeftConfig.from_pretrained(str(adapter.folder))
    settings.inference_mode = True
    with warnings.catch_warnings():
        # peft warns of adapters on tied embeddings; they are what is compared here.
        warnings.simplefilter("ignore")
        wrapped = PeftModel(model, settings, low_cpu_mem_usage=True)
        # In fp32: peft rounds matrices to the dtype of a base layer that the file brings along,
        # before it can be asked not to.
        tensors = {key: adapter.read(key).float() for key in adapter.shapes}
        set_peft_model_state_dict(wrapped, tensors, low_cpu_mem_usage=True)
    return wrapped.float()


def _fill_buffers(model: Any, source: TensorSource) -> None:
    """Read the buffers that are stored with the weights."""
    for name, buffer in model.named_buffers():
        stored = find_name(name, source.specs)
        if stored is not None:
            buffer.copy_(read_whole(source, stored))


def _units(model: Any, owners: dict[str, Any]) -> list[Unit]:
    """Return every module with parameters, or the outermost wrapper around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = {id(module): name for name, module in owners.items()}
    taken: set[int] = set()
    units = []
    for name, module in model.named_modules():
        wrapper = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if id(module) in taken or not (wrapper or id(module) in names):
            continue
        inside = list(module.modules()) if wrapper else [module]
        taken |= {id(part) for part in inside}
        inner = [(names[id(part)], part) for part in inside if id(part) in names]
        units.append(
            Unit(
                name=name,
                outer=module,
                inner=inner,
                by_rows=_computes_by_rows(module, [part for _, part in inner]),
            )
        )
    return units


def _computes_by_rows(outer: Any, inner: list[Any]) -> bool:
    """Return whether only plain layers use the weights, and all of them come from the source.

    DoRA, trained rows and saved modules use the whole weight.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not all(type(module) in (torch.nn.Linear, torch.nn.Embedding) for module in inner):
        return False
    parameters = [parameter for module in inner for parameter in module._parameters.values()]
    if not all(parameter is None or is_hollow(parameter) for parameter in parameters):
        return False
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in outer.modules()):
        return False
    return outer is inner[0] or (isinstance(outer, LoraLayer) and not outer.lora_variant)


def _take_rows(blocks: Iterable[torch.Tensor], ids: torch.Tensor, width: int) -> torch.Tensor:
    """Take rows of an embedding; the result has the shape (..., width).

    Raises:
        IndexError: An id has no row, as in ``torch.nn.Embedding``.
    """
    rows = torch.full((*ids.shape, width), math.nan)
    first = 0
    for block in blocks:
        inside = (ids >= first) & (ids < first + len(block))
        rows[inside] = block[ids[inside] - first]
        first += len(block)
    if int(ids.max()) >= first:
        raise IndexError(f"token {int(ids.max())} has no row among {first}")
    return rows
