"""A torch optimizer whose master weights and states are stored in fewer bytes than fp32.

A step goes through the flat tensors of ZeRO in pieces: it converts a piece of weights, gradients
and states to fp32, lets the update rule work on it, and stores the result, rounded to bf16 or
encoded in blocks of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.config.groups.optim import Rounding
from llmtune.engine.paged_memory import paged_zeros
from llmtune.engine.rounding import RandomBits, Run, round_stochastically, rounding_key
from llmtune.engine.state_slices import StateSlice
from llmtune.optimizer.block_codes import count_blocks, decode_blocks, encode_blocks
from llmtune.optimizer.optimizer import COMPENSATION, CONVERTED_ELEMENTS, Optimizer
from llmtune.optimizer.storage import BF16, BLOCK_ELEMENTS, Storage
from llmtune.optimizer.update import Update


@dataclass(frozen=True, slots=True)
class Blocks:
    """A state in 8 bits.

    It is no tensor, because DeepSpeed cuts a state's tensors where it has cut their parameter's.
    """

    codes: torch.Tensor
    """Shape (blocks, 256), uint8."""
    scales: torch.Tensor
    """Shape (blocks,), fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements of one parameter that are updated together."""

    name: str
    first: int
    """The first one's place in the flattened parameter."""
    numel: int
    offset: int
    """Its place in the flat tensor."""
    block: int
    """The first block's place among those of the flat tensor."""

    @property
    def blocks(self) -> int:
        """Return the number of blocks that its elements are in."""
        return count_blocks(self.first, self.numel)


class ConvertingOptimizer(torch.optim.Optimizer):
    """Makes the steps of an optimizer that stores bf16 or 8 bits."""

    def __init__(
        self, groups: list[dict[str, Any]], rule: Optimizer, settings: dict[str, Any], seed: int
    ):
        """
        Args:
            groups: Parameters by group, with the settings that are the group's own.
            rule: The optimizer, which has an ``update``.
            settings: The settings of all other groups, ``lr`` among them.
            seed: Of the random bits with which numbers are rounded.
        """
        super().__init__(groups, dict(settings))
        self._rule = rule
        self._seed = seed
        self._pieces: dict[int, list[Piece]] = {}
        # Codes of 8 bits are the nearest, and Kahan's sum loses nothing.
        self._draws = rule.rounding is Rounding.stochastic or (
            rule.rounding is Rounding.kahan
            and any(rule.storage(name) is BF16 for name in rule.states if name != COMPENSATION)
        )

    def place(self, slices: Iterable[StateSlice]) -> None:
        """Tell which elements of which parameters are in the flat tensors. Once, before a step."""
        by_flat: dict[int, list[StateSlice]] = {}
        for part in slices:
            by_flat.setdefault(id(part.flat), []).append(part)
        for key, parts in by_flat.items():
            parts.sort(key=lambda part: part.flat_offset)
            self._pieces[key] = list(_cut(parts, _limit(parts[0].flat)))

    def piece_of(self, part: StateSlice) -> Piece:
        """Return a whole slice as one piece."""
        first = next(
            piece for piece in self._pieces[id(part.flat)] if piece.offset == part.flat_offset
        )
        return Piece(
            name=part.name,
            first=part.start,
            numel=part.numel,
            offset=part.flat_offset,
            block=first.block,
        )

    def make_state(self, flat: torch.Tensor) -> dict[str, Any]:
        """Return the state of a flat tensor; zeros where there was none."""
        state: dict[str, Any] = self.state[flat]
        if not state:
            state["step"] = 0
            last = self._pieces[id(flat)][-1]
            blocks = last.block + last.blocks
            for name in self._rule.states:
                state[name] = self._zeros(flat, self._rule.storage(name), blocks)
        return state

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update every flat tensor that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for flat in group["params"]:
                # A rank may hold nothing of a group but padding.
                if flat.grad is not None and id(flat) in self._pieces:
                    state = self.make_state(flat)
                    state["step"] += 1
                    for pieces in _batches(self._pieces[id(flat)], _limit(flat)):
                        self._update(flat, state, pieces, group)

    def _update(
        self,
        flat: torch.Tensor,
        state: dict[str, Any],
        pieces: list[Piece],
        settings: Mapping[str, Any],
    ) -> None:
        rule, step = self._rule, state["step"]
        assert rule.update is not None
        assert flat.grad is not None
        start, end = pieces[0].offset, pieces[-1].offset + pieces[-1].numel

        # Converted to fp32. Kahan's compensation belongs to the weights.
        master = flat.detach()[start:end]
        weights = master.float()
        if rule.rounding is Rounding.kahan:
            weights += state[COMPENSATION][start:end]
        names = [name for name in rule.states if name != COMPENSATION]
        values = {name: _load(state[name], rule.storage(name), pieces) for name in names}
        rule.update(
            Update(
                parameters=_views(weights, None, pieces),
                gradients=_views(flat.grad.detach()[start:end].float(), None, pieces),
                states={name: _views(values[name], rule.storage(name), pieces) for name in names},
                step=step,
                settings=settings,
            )
        )

        # Rounded, and stored.
        bits = None
        if self._draws:
            bits = RandomBits(list(self._runs(pieces, step)), flat.device)
        for name in names:
            if rule.storage(name).in_blocks:
                _store_blocks(state[name], values[name], rule.storage(name), pieces)
            else:
                _store(state[name][start:end], values[name], bits)
        if rule.rounding is Rounding.kahan:
            master.copy_(weights)
            state[COMPENSATION][start:end].copy_(weights.sub_(master))
        else:
            _store(master, weights, bits)

    def _zeros(self, flat: torch.Tensor, storage: Storage, blocks: int) -> torch.Tensor | Blocks:
        if not storage.in_blocks:
            dtype = torch.bfloat16 if storage.element_bytes == 2 else torch.float32
            return torch.zeros_like(flat, dtype=dtype, requires_grad=False)
        zeros: Callable[..., torch.Tensor] = paged_zeros if self._rule.is_paged else torch.zeros
        return Blocks(
            codes=zeros((blocks, BLOCK_ELEMENTS), dtype=torch.uint8, device=flat.device),
            scales=zeros((blocks,), dtype=torch.float32, device=flat.device),
        )

    def _runs(self, pieces: list[Piece], step: int) -> Iterator[Run]:
        """Say which elements of which parameters follow each other in the flat tensor."""
        reached = pieces[0].offset
        for piece in pieces:
            key = rounding_key(self._seed, step, piece.name)
            gap = piece.offset - reached
            yield Run(key=key, first=piece.first, numel=piece.numel, gap=gap)
            reached = piece.offset + piece.numel


def _limit(tensor: torch.Tensor) -> int:
    return CONVERTED_ELEMENTS["cpu" if tensor.device.type == "cpu" else "cuda"]


def _cut(parts: list[StateSlice], limit: int) -> Iterator[Piece]:
    """Cut slices at multiples of the limit, counted from the parameter's first element.

    Blocks are whole in a piece, except where ZeRO has cut the parameter.
    """
    block = 0
    for part in parts:
        first, end = part.start, part.start + part.numel
        while first < end:
            last = min(end, (first // limit + 1) * limit)
            piece = Piece(
                name=part.name,
                first=first,
                numel=last - first,
                offset=part.flat_offset + first - part.start,
                block=block,
            )
            yield piece
            block += piece.blocks
            first = last


def _batches(pieces: list[Piece], limit: int) -> Iterator[list[Piece]]:
    """Put neighbors together, up to the limit."""
    batch: list[Piece] = []
    for piece in pieces:
        if batch and piece.offset + piece.numel - batch[0].offset > limit:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _views(
    values: torch.Tensor, storage: Storage | None, pieces: list[Piece]
) -> list[torch.Tensor]:
    """Return what :func:`_load` returned for each piece."""
    if storage is None or not storage.in_blocks:
        start = pieces[0].offset
        return [values.narrow(0, piece.offset - start, piece.numel) for piece in pieces]
    start = pieces[0].block
    places = [
        BLOCK_ELEMENTS * (piece.block - start) + piece.first % BLOCK_ELEMENTS for piece in pieces
    ]
    flat = values.view(-1)
    return [flat.narrow(0, at, piece.numel) for at, piece in zip(places, pieces, strict=True)]


def _load(stored: torch.Tensor | Blocks, storage: Storage, pieces: list[Piece]) -> torch.Tensor:
    """Convert a state to fp32: the elements from first to last piece, or their blocks."""
    first, last = pieces[0], pieces[-1]
    if isinstance(stored, Blocks):
        blocks = slice(first.block, last.block + last.blocks)
        return decode_blocks(stored.codes[blocks], stored.scales[blocks], storage)
    return stored[first.offset : last.offset + last.numel].float()


def _store(target: torch.Tensor, values: torch.Tensor, bits: RandomBits | None) -> None:
    if bits is not None and target.dtype is torch.bfloat16:
        values = round_stochastically(values, bits.take())
    target.copy_(values)


def _store_blocks(
    stored: Blocks, values: torch.Tensor, storage: Storage, pieces: list[Piece]
) -> None:
    blocks = slice(pieces[0].block, pieces[-1].block + pieces[-1].blocks)
    stored.codes[blocks], stored.scales[blocks] = encode_blocks(values, storage)
