"""Merge an adapter into its base as a stream: ``W + scale * B @ A`` in fp32, rounded once.

In memory are a few blocks of rows and one module's adapter, whatever the model's size; only DoRA on
layers that store their outputs as columns (embeddings, GPT-2's Conv1D) takes one whole tensor. A
tensor of the adapter that matches nothing in the base is an error.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.merge.adapter import Adapter, ModuleTensors, is_module_to_save
from llmtune.export.merge.deltas import Delta, LoraBias, LowRank, Replacement, StackPart, TokenRows
from llmtune.export.sources.tensor_source import (
    TensorSource,
    find_name,
    is_embedding,
    is_input_embedding,
    read_whole,
)
from llmtune.storage.tensors.row_blocks import row_ranges
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.units import some


@dataclass(frozen=True, slots=True)
class Edit:
    """The computation of one tensor of the merged model."""

    base: str
    """The base's tensor; its rows are not read where the first delta is a replacement."""
    spec: TensorSpec
    deltas: tuple[Delta, ...]
    """Applied to the rows in order."""


class MergedSource:
    """A base with an adapter merged into it."""

    def __init__(
        self,
        base: TensorSource,
        adapter: Adapter,
        output: str | None,
        stacks: Mapping[str, StackPart] = MappingProxyType({}),
    ) -> None:
        """Match every tensor of the adapter to one of the base.

        Args:
            output: The model's name of the matrix of its logits, stored or tied to the input
                embedding; None if it has none.
            stacks: The base's tensors of stacked experts -> what the adapter does to them.

        Raises:
            ExportError: A tensor does not match; all of them are named.
        """
        self._base = base
        self._adapter = adapter
        self._output = output
        keys = {delta.a for delta in stacks.values()}
        self._edits = _Matcher(base, adapter, output, keys).match()
        for name, delta in stacks.items():
            self._edits[name] = Edit(name, base.specs[name], (delta,))
        self.specs = dict(base.specs) | {name: edit.spec for name, edit in self._edits.items()}

    @property
    def changed(self) -> dict[str, Edit]:
        """Return the tensors that differ from the base's, by name."""
        return dict(self._edits)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Return keys of ``config.json`` that differ from the base's: vocabulary size and tying."""
        changes: dict[str, Any] = {}
        for name, edit in self._edits.items():
            if is_embedding(name) and edit.spec.shape[0] != self._base.specs[edit.base].shape[0]:
                changes["vocab_size"] = edit.spec.shape[0]
        stored = self._output is not None and find_name(self._output, self.specs) is not None
        if stored and any(name == self._output or is_embedding(name) for name in self._edits):
            # Both matrices are stored; with a configuration that ties them, loaders drop one.
            changes["tie_word_embeddings"] = False
        return changes

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield unchanged tensors as the base has them, and others in fp32, not yet rounded."""
        edit = self._edits.get(name)
        if edit is None:
            yield from self._base.blocks(name)
            return
        steps = [delta.bind(self._adapter.read) for delta in edit.deltas]
        for first, rows in self._rows(edit):
            for step in steps:
                rows = step(rows, first)
            yield rows

    def _rows(self, edit: Edit) -> Iterator[tuple[int, torch.Tensor]]:
        if edit.deltas and isinstance(edit.deltas[0], Replacement):
            # A replaced tensor is not read; a resized one has other rows.
            for first, last in row_ranges(edit.spec.shape):
                yield first, torch.empty((last - first, *edit.spec.shape[1:]), device="meta")
        elif any(delta.needs_all_rows for delta in edit.deltas):
            yield 0, read_whole(self._base, edit.base)
        else:
            first = 0
            for rows in self._base.blocks(edit.base):
                yield first, rows
                first += len(rows) if rows.ndim else 1


class _Matcher:
    """Finds the base's tensor for each tensor of the adapter, and collects all problems."""

    def __init__(
        self, base: TensorSource, adapter: Adapter, output: str | None, of_stacks: Collection[str]
    ) -> None:
        self._base = base
        self._adapter = adapter
        self._of_stacks = of_stacks
        self._problems: list[str] = []
        self._output = output
        stored = output is not None and find_name(output, base.specs) is not None
        self._input = next(filter(is_input_embedding, base.specs), None)
        # Of one matrix that serves as both, files hold the input embedding alone.
        self._tied = self._input is not None and output is not None and not stored

    def match(self) -> dict[str, Edit]:
        """Return every tensor that changes, by its name in the merged model.

        Raises:
            ExportError: Tensors do not match, or nothing would change.
        """
        edits: dict[str, Edit] = {}

        # One edit per weight and bias that the adapter changes.
        for parts in self._adapter.modules.values():
            if parts.keys.get("a") in self._of_stacks:
                continue
            for kind, deltas in (
                ("weight", self._weight_deltas(parts)),
                ("bias", self._bias_deltas(parts)),
            ):
                if deltas or (kind == "weight" and "base_weight" in parts.keys):
                    self._add(edits, parts, f"{parts.module}.{kind}", deltas)

        # Tied matrices, when all edits are known.
        if not self._problems:
            self._resolve_tying(edits)
        if self._problems:
            raise ExportError(
                f"the adapter {self._adapter.folder} does not belong to this base:"
                f" {len(self._problems)} of {len(self._adapter.modules)} modules do not match:"
                f" {some(self._problems)}; nothing was written"
            )
        if not edits and not self._of_stacks:
            raise ExportError(
                f"{self._adapter.folder}: no tensor of the base would change; nothing was written"
            )
        return {
            name: edit
            for name, edit in edits.items()
            if edit.deltas or name not in self._base.specs
        }

    def _weight_deltas(self, parts: ModuleTensors) -> list[Delta]:
        """Return what the adapter does to a module's weight, in the order of application."""
        keys, shapes = parts.keys, self._adapter.shapes
        deltas: list[Delta] = []

        # A weight that was trained as a whole, or a copy of the base's whose vocabulary grew.
        if "weight" in keys:
            if not self._may_replace(parts.module):
                self._problems.append(
                    f"{keys['weight']} is neither in modules_to_save nor an embedding"
                )
            deltas.append(Replacement(keys["weight"]))
        elif "base_weight" in keys and self._grew(parts):
            deltas.append(Replacement(keys["base_weight"]))

        # LoRA's two matrices, on a linear layer or on an embedding.
        if "a" in keys:
            transposed = self._stores_columns(parts)
            scale = self._scale(parts.module, shapes[keys["a"]][0])
            deltas.append(
                LowRank(
                    a=keys["a"],
                    b=keys["b"],
                    scale=scale,
                    transposed=transposed,
                    magnitude=keys.get("magnitude"),
                )
            )
        if "embedding_a" in keys:
            scale = self._scale(parts.module, shapes[keys["embedding_a"]][0])
            deltas.append(
                LowRank(
                    a=keys["embedding_a"],
                    b=keys["embedding_b"],
                    scale=scale,
                    transposed=True,
                    magnitude=keys.get("magnitude"),
                )
            )

        # Rows of an embedding that were trained one by one.
        if "token_rows" in keys:
            indices = self._adapter.token_indices(parts.module)
            rows = shapes[keys["token_rows"]][0]
            if len(indices) != rows:
                self._problems.append(
                    f"{parts.module} has {rows} trained rows for {len(indices)}"
                    " trainable_token_indices"
                )
            deltas.append(TokenRows(keys["token_rows"], indices))
        return deltas

    def _bias_deltas(self, parts: ModuleTensors) -> list[Delta]:
        keys = parts.keys
        deltas: list[Delta] = [
            Replacement(keys[part]) for part in ("base_bias", "bias") if part in keys
        ]
        if "b_bias" in keys:
            rank = self._adapter.shapes[keys["a"]][0]
            deltas.append(LoraBias(keys["b_bias"], self._scale(parts.module, rank)))
        return deltas

    def _add(
        self, edits: dict[str, Edit], parts: ModuleTensors, parameter: str, deltas: list[Delta]
    ) -> None:
        """Add the edit of one parameter, or its problem."""
        # The base's tensor; a tied output has that of the input embedding.
        base_name = self._base_name(parameter)
        merged_name = base_name
        if base_name is None and self._tied and parameter == self._output:
            base_name, merged_name = self._input, parameter
        if base_name is None or merged_name is None:
            hint = ""
            if parameter.endswith(".bias"):
                hint = "; a base layer without bias cannot take lora_bias"
            self._problems.append(f"{parameter} is not in the base{hint}")
            return

        # The shape of the result, and what contradicts it.
        spec = self._base.specs[base_name]
        shape = self._result_shape(deltas, spec.shape)
        problem = self._find_shape_problem(parameter, spec.shape, deltas)
        if problem:
            self._problems.append(problem)
        elif "base_weight" in parts.keys and parameter.endswith(".weight"):
            self._compare_copy(parts.keys["base_weight"], base_name)
        edits[merged_name] = Edit(
            base_name, replace(spec, name=merged_name, shape=shape), tuple(deltas)
        )

    def _base_name(self, parameter: str) -> str | None:
        return find_name(parameter, self._base.specs)

    def _find_shape_problem(
        self, parameter: str, shape: tuple[int, ...], deltas: list[Delta]
    ) -> str | None:
        """Find a delta whose shape contradicts the base's, or that of the replacement before it."""
        shapes = self._adapter.shapes
        for delta in deltas:
            if isinstance(delta, TokenRows):
                rows = shapes[delta.key]
                if rows[1:] != shape[1:] or max(delta.indices, default=0) >= shape[0]:
                    return (
                        f"{parameter} is {shape} in the base, its trained rows are {rows} up"
                        f" to {max(delta.indices)}; where training added tokens, name the run"
                        " (run=), whose base has them"
                    )
                continue
            delta_shape = self._shape_of(delta)
            resizes = isinstance(delta, Replacement) and is_embedding(parameter)
            if resizes and delta_shape[1:] == shape[1:]:
                shape = delta_shape
            if delta_shape != shape:
                return f"{parameter} is {shape} in the base, the adapter is for {delta_shape}"
        return None

    def _shape_of(self, delta: Delta) -> tuple[int, ...]:
        shapes = self._adapter.shapes
        if isinstance(delta, LowRank):
            shape = (shapes[delta.b][0], shapes[delta.a][1])
            return shape[::-1] if delta.transposed else shape
        assert isinstance(delta, Replacement | LoraBias)
        return shapes[delta.key]

    def _result_shape(self, deltas: list[Delta], shape: tuple[int, ...]) -> tuple[int, ...]:
        return next(
            (self._adapter.shapes[c.key] for c in deltas if isinstance(c, Replacement)), shape
        )

    def _grew(self, parts: ModuleTensors) -> bool:
        """Return whether the stored copy of a base layer has more rows than the base."""
        name = self._base_name(f"{parts.module}.weight") or self._input
        return (
            name is not None
            and self._adapter.shapes[parts.keys["base_weight"]][0] > self._base.specs[name].shape[0]
        )

    def _compare_copy(self, key: str, name: str) -> None:
        """Compare the copy that peft stores of the layer below an adapted embedding.

        Where it is not equal to the base's layer, the adapter belongs to another base.
        """
        copy = self._adapter.read(key)
        first = 0
        if len(copy) < self._base.specs[name].shape[0]:
            self._problems.append(
                f"{key} is not equal to the base's {name}: it has {len(copy)} rows"
            )
            return
        for rows in self._base.blocks(name):
            if not torch.equal(copy[first : first + len(rows)].to(rows.dtype), rows):
                self._problems.append(f"{key} is not equal to the base's {name}")
                return
            first += len(rows)

    def _stores_columns(self, parts: ModuleTensors) -> bool:
        """Return whether the base stores (in, out); for a square matrix, see ``fan_in_fan_out``."""
        out = self._adapter.shapes[parts.keys["b"]][0]
        width = self._adapter.shapes[parts.keys["a"]][1]
        name = self._base_name(f"{parts.module}.weight")
        if name is None or out == width:
            return bool(self._adapter.settings.get("fan_in_fan_out"))
        return self._base.specs[name].shape == (width, out)

    def _scale(self, module: str, rank: int) -> float:
        try:
            return self._adapter.scale(module, rank)
        except ExportError as error:
            self._problems.append(str(error))
            return 1.0

    def _may_replace(self, module: str) -> bool:
        saved = self._adapter.settings.get("modules_to_save") or []
        return any(is_module_to_save(module, name) for name in saved) or is_embedding(
            f"{module}.weight"
        )

    def _resolve_tying(self, edits: dict[str, Edit]) -> None:
        """Keep one matrix for input and output if the adapter treats both alike; else make two."""
        if not self._tied or self._input is None or self._output is None:
            return
        output = self._output
        input_edit, output_edit = edits.get(self._input), edits.get(output)

        # Nothing changes but single rows, which peft ties by itself: they stay one matrix.
        only_rows = input_edit is None or all(
            isinstance(delta, TokenRows) for delta in input_edit.deltas
        )
        if output_edit is None and only_rows:
            return

        # Both change in the same way: they stay one matrix, and the input's edit is enough.
        if output_edit is not None:
            if input_edit is not None and self._are_equal(input_edit, output_edit):
                del edits[output]
            return

        # The input alone changes: the output is stored too, as it was. It has no rows for a
        # vocabulary that grew.
        assert input_edit is not None
        spec = self._base.specs[self._input]
        if input_edit.spec.shape != spec.shape:
            self._problems.append(
                f"{self._input} grew to {input_edit.spec.shape[0]} rows, and the output that was"
                " tied to it is not there"
            )
        edits[output] = Edit(self._input, replace(spec, name=output), ())

    def _are_equal(self, one: Edit, other: Edit) -> bool:
        """Return whether two edits of the same matrix have the same result."""
        if len(one.deltas) != len(other.deltas):
            return False
        return all(self._same_delta(a, b) for a, b in zip(one.deltas, other.deltas, strict=True))

    def _same_delta(self, a: Delta, b: Delta) -> bool:
        read = self._adapter.read
        if isinstance(a, Replacement) and isinstance(b, Replacement):
            return torch.equal(read(a.key), read(b.key))
        if isinstance(a, LowRank) and isinstance(b, LowRank) and a.transposed != b.transposed:
            # ensure_weight_tying: an embedding's A and B are the output's B and A, transposed.
            return (
                a.scale == b.scale
                and a.magnitude is None
                and b.magnitude is None
                and torch.equal(read(a.a), read(b.b).T)
                and torch.equal(read(a.b), read(b.a).T)
            )
        if isinstance(a, TokenRows) and isinstance(b, TokenRows):
            return a.indices == b.indices and torch.equal(read(a.key), read(b.key))
        return False
