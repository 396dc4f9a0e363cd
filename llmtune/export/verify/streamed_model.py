"""A transformers model that holds the weights of one module at a time: read before it computes,
dropped after.

Plain linear layers and embeddings, also those below LoRA's matrices, hold not even that: they
compute block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.merge.peft_adapter import Adapter
from llmtune.export.sources.tensor_source import (
    TensorSource,
    find_name,
    is_input_embedding,
    read_whole,
)
from llmtune.model.skeleton import build_skeleton, hollow, is_hollow, tied_aliases

# : Told of a wrapped module, its input and its output, while the weights below the wrapper are
# there.
UnitHook = Callable[["Unit", tuple[Any, ...], torch.Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is loaded together: a module with parameters, or peft's wrapper around one."""

    name: str
    outer: Any
    inner: list[tuple[str, Any]]
    """Modules of the base in it, by the name they have in the unwrapped model."""

    by_rows: bool
    """Whether nothing asks for the inner weights but the inner modules' own arithmetic, which goes
    by rows.
    """

    @property
    def wrapped(self) -> bool:
        """Whether an adapter is on it."""
        return len(self.inner) != 1 or self.inner[0][1] is not self.outer


class StreamedModel:
    """The skeleton of a model; parameters come from a source, in fp32, while their module
    computes.
    """

    def __init__(
        self,
        folder: Path,
        source: TensorSource,
        adapter: Adapter | None = None,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Build what ``config.json`` in ``folder`` describes, ``changes`` made, with peft's
        wrappers where there is an adapter.

        The source must use the model's own names;
        :func:`llmtune.export.verify.serving_checks.find_tensor_mismatches` tells.
        """
        self._source = source
        self.model = build_skeleton(folder, changes)
        settings = self.model.config.get_text_config()
        if settings.pad_token_id is None:
            # Heads that look for the last word of each text ask for it; no text is padded here.
            settings.pad_token_id = -1
        if adapter is not None:
            _resize(self.model, adapter)
        owners = {name: module for name, module in self.model.named_modules() if module._parameters}
        self.aliases = tied_aliases(self.model)
        _fill_buffers(self.model, source)
        if adapter is not None:
            self.model = _put_on(self.model, adapter)
        self.model.eval()
        self.units = _units(self.model, owners)
        self._look: UnitHook | None = None
        for unit in self.units:
            self._stream(unit)

    def logits(self, tokens: torch.Tensor, look: UnitHook | None = None) -> torch.Tensor:
        """Run it; shape (rows, positions, vocabulary), fp32.

        Args:
            tokens: Shape (rows, positions).
            look: Called behind every unit.
        """
        self._look = look
        with torch.no_grad():
            outputs = self.model(input_ids=tokens)
        # A model without a head answers with its last states.
        answer: torch.Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        return answer

    def with_weights_of(
        self, source: TensorSource, unit: Unit, arguments: tuple[Any, ...]
    ) -> torch.Tensor:
        """What the unit's one base module answers with another source's weights."""
        ((name, module),) = unit.inner
        if unit.by_rows:
            return self._answer(name, module, source, *arguments)
        before = dict(module._parameters)
        self._load(name, module, source, everything=True)
        try:
            answer: torch.Tensor = module(*arguments)
        finally:
            module._parameters.update(before)
        return answer

    def _load(
        self, name: str, module: Any, source: TensorSource, everything: bool = False
    ) -> list[str]:
        """Read a module's parameters; those that the adapter brought are there already, and are not
        the base's.
        """
        loaded = [
            key
            for key, old in module._parameters.items()
            if old is not None and (everything or is_hollow(old))
        ]
        for key in loaded:
            tensor = self._read(source, f"{name}.{key}")
            module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
        return loaded

    def _read(self, source: TensorSource, wanted: str) -> torch.Tensor:
        return read_whole(source, self._find(source, wanted)).float()

    def _find(self, source: TensorSource, wanted: str) -> str:
        for name in (wanted, *self.aliases.get(wanted, ())):
            found = find_name(name, source.specs)
            if found is not None:
                return found
        raise ExportError(f"{wanted}, which the model of config.json has, is in no file")

    def _answer(
        self, name: str, module: Any, source: TensorSource, given: torch.Tensor
    ) -> torch.Tensor:
        """What a linear layer or an embedding answers with a source's weights, of which a block is
        read at a time.
        """
        stored = self._find(source, f"{name}.weight")
        # Rounded as they are stored, whatever the blocks are computed in.
        blocks = (block.to(source.specs[stored].dtype).float() for block in source.blocks(stored))
        if isinstance(module, torch.nn.Embedding):
            return _pick_rows(blocks, given, module.embedding_dim)
        answer = torch.cat([given @ block.T for block in blocks], dim=-1)
        return answer if module.bias is None else answer + self._read(source, f"{name}.bias")

    def _stream(self, unit: Unit) -> None:
        """Hooks around the unit: load, compute, look, drop."""
        skeleton: list[tuple[Any, dict[str, Any]]] = []

        def before(_module: Any, _arguments: Any) -> None:
            for name, module in unit.inner:
                skeleton.append((module, dict(module._parameters)))
                self._load(name, module, self._source)

        def after(_module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if self._look is not None:
                self._look(unit, arguments, output)
            while skeleton:
                module, parameters = skeleton.pop()
                module._parameters.update(parameters)

        if unit.by_rows:
            for name, module in unit.inner:
                module.forward = partial(self._answer, name, module, self._source)
        else:
            unit.outer.register_forward_pre_hook(before)
        unit.outer.register_forward_hook(after)


def _resize(model: Any, adapter: Adapter) -> None:
    """A vocabulary that was resized before training lies in the adapter."""
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


def _put_on(model: Any, adapter: Adapter) -> Any:
    """peft's wrappers, with the adapter's numbers; ``from_pretrained`` would also look for another
    device.
    """
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
    """Buffers that are stored with the weights."""
    for name, buffer in model.named_buffers():
        found = find_name(name, source.specs)
        if found is not None:
            buffer.copy_(read_whole(source, found))


def _units(model: Any, owners: dict[str, Any]) -> list[Unit]:
    """Every module with parameters, inside the outermost wrapper around it."""
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
                by_rows=_goes_by_rows(module, [part for _, part in inner]),
            )
        )
    return units


def _goes_by_rows(outer: Any, inner: list[Any]) -> bool:
    """Plain layers whose weights are the source's; DoRA, trained rows and saved modules look at the
    whole weight.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not all(type(module) in (torch.nn.Linear, torch.nn.Embedding) for module in inner):
        return False
    if not all(
        is_hollow(parameter)
        for module in inner
        for parameter in module._parameters.values()
        if parameter is not None
    ):
        return False
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in outer.modules()):
        return False
    return outer is inner[0] or (isinstance(outer, LoraLayer) and not outer.lora_variant)


def _pick_rows(blocks: Iterable[torch.Tensor], ids: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of an embedding; shape (..., width).

    Raises:
        IndexError: An id has no row, as in ``torch.nn.Embedding``.
    """
    answer = torch.full((*ids.shape, width), math.nan)
    first = 0
    for block in blocks:
        here = (ids >= first) & (ids < first + len(block))
        answer[here] = block[ids[here] - first]
        first += len(block)
    if int(ids.max()) >= first:
        raise IndexError(f"token {int(ids.max())} has no row among {first}")
    return answer
