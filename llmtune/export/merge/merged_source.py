"""Merge an adapter into its base as a stream: ``W + scale * B @ A`` in fp32, rounded once, a few
rows at a time.

Memory is that of a few blocks and of one module's adapter, whatever the model's size; only DoRA on
layers that store their outputs as columns (embeddings, GPT-2's Conv1D) takes one whole tensor. What
matches nothing is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.merge.deltas import Delta, LoraBias, LowRank, Replacement, TokenRows
from llmtune.export.merge.peft_adapter import Adapter, ModuleTensors, is_module_to_save
from llmtune.export.sources.tensor_source import (
    TensorSource,
    find_name,
    is_embedding,
    is_input_embedding,
    read_whole,
    some,
)
from llmtune.storage.row_blocks import row_ranges
from llmtune.storage.safetensors_writer import TensorSpec


@dataclass(frozen=True, slots=True)
class Edit:
    """What becomes of one tensor: rows of the base, or of nothing where the adapter brings its own,
    changed in turn.
    """

    base: str
    spec: TensorSpec
    changes: tuple[Delta, ...]


class MergedSource:
    """A base with an adapter merged into it."""

    def __init__(self, base: TensorSource, adapter: Adapter, output: str | None) -> None:
        """Match every tensor of the adapter to one of the base.

        Args:
            output: What the model calls the matrix of its logits, stored or tied to the input; None
                if it has none.

        Raises:
            ExportError: Anything does not match; all of it is named.
        """
        self._base = base
        self._adapter = adapter
        self._output = output
        self._edits = _Matcher(base, adapter, output).match()
        self.specs = dict(base.specs) | {name: edit.spec for name, edit in self._edits.items()}

    @property
    def changed(self) -> dict[str, Edit]:
        """Tensors that are not the base's, by name."""
        return dict(self._edits)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Keys of ``config.json`` that are no longer the base's: the vocabulary, and whether
        embeddings are tied.
        """
        changes: dict[str, Any] = {}
        for name, edit in self._edits.items():
            if is_embedding(name) and edit.spec.shape[0] != self._base.specs[edit.base].shape[0]:
                changes["vocab_size"] = edit.spec.shape[0]
        stored = self._output is not None and find_name(self._output, self.specs) is not None
        if stored and any(name == self._output or is_embedding(name) for name in self._edits):
            # Both are stored; a configuration that ties them would make loaders drop one.
            changes["tie_word_embeddings"] = False
        return changes

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Unchanged tensors as the base has them; others in fp32, not yet rounded."""
        edit = self._edits.get(name)
        if edit is None:
            yield from self._base.blocks(name)
            return
        steps = [change.bind(self._adapter.read) for change in edit.changes]
        for first, rows in self._rows(edit):
            for step in steps:
                rows = step(rows, first)
            yield rows

    def _rows(self, edit: Edit) -> Iterator[tuple[int, torch.Tensor]]:
        if edit.changes and isinstance(edit.changes[0], Replacement):
            # What is replaced is not read; a resized one has other rows.
            for first, last in row_ranges(edit.spec.shape):
                yield first, torch.empty((last - first, *edit.spec.shape[1:]), device="meta")
        elif any(change.needs_all_rows for change in edit.changes):
            yield 0, read_whole(self._base, edit.base)
        else:
            first = 0
            for rows in self._base.blocks(edit.base):
                yield first, rows
                first += len(rows) if rows.ndim else 1


class _Matcher:
    """Which tensor of the base each tensor of the adapter belongs to, with everything that is wrong
    collected.
    """

    def __init__(self, base: TensorSource, adapter: Adapter, output: str | None) -> None:
        self._base = base
        self._adapter = adapter
        self._problems: list[str] = []
        self._output = output
        stored = output is not None and find_name(output, base.specs) is not None
        self._input = next(filter(is_input_embedding, base.specs), None)
        # Of one matrix that serves as both, files hold the input alone.
        self._tied = self._input is not None and output is not None and not stored

    def match(self) -> dict[str, Edit]:
        """Every tensor that changes, by its name in the merged model."""
        edits: dict[str, Edit] = {}
        for parts in self._adapter.modules.values():
            for kind, changes in (
                ("weight", self._weight_changes(parts)),
                ("bias", self._bias_changes(parts)),
            ):
                if changes or (kind == "weight" and "base_weight" in parts.keys):
                    self._add(edits, parts, f"{parts.module}.{kind}", changes)
        if not self._problems:
            self._resolve_tying(edits)
        if self._problems:
            raise ExportError(
                f"the adapter {self._adapter.folder} does not belong to this base:"
                f" {len(self._problems)} of {len(self._adapter.modules)} modules do not match:"
                f" {some(self._problems)}; nothing was written"
            )
        if not edits:
            raise ExportError(
                f"{self._adapter.folder}: no tensor of the base would change; nothing was written"
            )
        return {
            name: edit
            for name, edit in edits.items()
            if edit.changes or name not in self._base.specs
        }

    def _weight_changes(self, parts: ModuleTensors) -> list[Delta]:
        keys, shapes = parts.keys, self._adapter.shapes
        changes: list[Delta] = []
        if "weight" in keys:
            changes.append(Replacement(keys["weight"]))
        elif "base_weight" in keys and self._grew(parts):
            changes.append(Replacement(keys["base_weight"]))
        if "a" in keys:
            transposed = self._stores_columns(parts)
            scale = self._scale(parts.module, shapes[keys["a"]][0])
            changes.append(
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
            changes.append(
                LowRank(
                    a=keys["embedding_a"],
                    b=keys["embedding_b"],
                    scale=scale,
                    transposed=True,
                    magnitude=keys.get("magnitude"),
                )
            )
        if "token_rows" in keys:
            indices = self._adapter.token_indices(parts.module)
            if len(indices) != shapes[keys["token_rows"]][0]:
                rows = shapes[keys["token_rows"]][0]
                self._problems.append(
                    f"{parts.module} has {rows} trained rows for {len(indices)}"
                    " trainable_token_indices"
                )
            changes.append(TokenRows(keys["token_rows"], indices))
        if "weight" in keys and not self._may_replace(parts.module):
            self._problems.append(
                f"{keys['weight']} is neither in modules_to_save nor an embedding"
            )
        return changes

    def _bias_changes(self, parts: ModuleTensors) -> list[Delta]:
        keys = parts.keys
        changes: list[Delta] = [
            Replacement(keys[part]) for part in ("base_bias", "bias") if part in keys
        ]
        if "b_bias" in keys:
            rank = self._adapter.shapes[keys["a"]][0]
            changes.append(LoraBias(keys["b_bias"], self._scale(parts.module, rank)))
        return changes

    def _add(
        self, edits: dict[str, Edit], parts: ModuleTensors, wanted: str, changes: list[Delta]
    ) -> None:
        """Note an edit, or what is wrong with it."""
        name = self._base_name(wanted)
        ours = name
        if name is None and self._tied and wanted == self._output:
            name, ours = self._input, wanted
        if name is None or ours is None:
            why = (
                "; a base layer without bias cannot take lora_bias"
                if wanted.endswith(".bias")
                else ""
            )
            self._problems.append(f"{wanted} is not in the base{why}")
            return
        spec = self._base.specs[name]
        shape = self._result_shape(changes, spec.shape)
        wrong = self._shape_problem(wanted, spec.shape, changes)
        if wrong:
            self._problems.append(wrong)
        elif "base_weight" in parts.keys and wanted.endswith(".weight"):
            self._check_copy(parts.keys["base_weight"], name)
        edits[ours] = Edit(name, replace(spec, name=ours, shape=shape), tuple(changes))

    def _base_name(self, wanted: str) -> str | None:
        return find_name(wanted, self._base.specs)

    def _shape_problem(
        self, wanted: str, shape: tuple[int, ...], changes: list[Delta]
    ) -> str | None:
        """How the adapter's shapes contradict the base's."""
        shapes, embedding = self._adapter.shapes, is_embedding(wanted)
        for change in changes:
            found: tuple[int, ...] = shape
            if isinstance(change, LowRank):
                found = (shapes[change.b][0], shapes[change.a][1])
                found = found[::-1] if change.transposed else found
            elif isinstance(change, Replacement):
                found = shapes[change.key]
                if embedding and found[1:] == shape[1:]:
                    shape = found
            elif isinstance(change, LoraBias):
                found = shapes[change.key]
            elif isinstance(change, TokenRows) and (
                shapes[change.key][1:] != shape[1:] or max(change.indices, default=0) >= shape[0]
            ):
                return (
                    f"{wanted} is {shape} in the base, its trained rows are {shapes[change.key]} up"
                    f" to {max(change.indices)}"
                )
            if found != shape:
                return f"{wanted} is {shape} in the base, the adapter is for {found}"
        return None

    def _result_shape(self, changes: list[Delta], shape: tuple[int, ...]) -> tuple[int, ...]:
        return next(
            (self._adapter.shapes[c.key] for c in changes if isinstance(c, Replacement)), shape
        )

    def _grew(self, parts: ModuleTensors) -> bool:
        """Whether the stored copy of a base layer has more rows than the base: its vocabulary was
        resized.
        """
        name = self._base_name(f"{parts.module}.weight") or self._input
        return (
            name is not None
            and self._adapter.shapes[parts.keys["base_weight"]][0] > self._base.specs[name].shape[0]
        )

    def _check_copy(self, key: str, name: str) -> None:
        """peft stores the layer below an adapted embedding; it must be the base's, or the adapter
        is another base's.
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
        """Told by the shapes; of a square matrix, by ``fan_in_fan_out``."""
        out, width = (
            self._adapter.shapes[parts.keys["b"]][0],
            self._adapter.shapes[parts.keys["a"]][1],
        )
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
        """One matrix for input and output stays one only if the adapter treats both alike; else it
        becomes two.
        """
        if not self._tied or self._input is None or self._output is None:
            return
        output, into = self._output, edits.get(self._input)
        if output not in edits and (
            into is None or all(isinstance(change, TokenRows) for change in into.changes)
        ):
            # peft ties trained rows by itself.
            return
        if output in edits and into is not None and self._alike(into, edits[output]):
            del edits[output]
            return
        if output not in edits:
            spec = self._base.specs[self._input]
            grown = into.spec.shape if into is not None else spec.shape
            if grown != spec.shape:
                self._problems.append(
                    f"{self._input} grew to {grown[0]} rows, and the output that was tied to it is"
                    " not there"
                )
            edits[output] = Edit(self._input, replace(spec, name=output), ())

    def _alike(self, one: Edit, other: Edit) -> bool:
        """Whether two edits of the same matrix come to the same."""
        if len(one.changes) != len(other.changes):
            return False
        return all(self._same_change(a, b) for a, b in zip(one.changes, other.changes, strict=True))

    def _same_change(self, a: Delta, b: Delta) -> bool:
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
