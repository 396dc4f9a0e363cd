"""Steps on master weights and moments that are stored in bf16 or 8 bits, against torch's AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtune.config.groups.optim import OptimConfig, Rounding
from llmtune.engine.optimizers import converting_optimizer
from llmtune.engine.optimizers.converting_optimizer import Blocks, ConvertingOptimizer
from llmtune.engine.state_slices import StateSlice
from llmtune.optimizer.block_codes import decode_blocks
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.optimizer.storage import BLOCK_ELEMENTS, UNSIGNED_8BIT

SETTINGS = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
NUMELS = {"a": 30000, "b": 7, "c": 1024}


def begin() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(k, generator=generator).bfloat16() for n, k in NUMELS.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        n: torch.randn(k, generator=generator).mul(torch.arange(k).cos()).bfloat16()
        for n, k in NUMELS.items()
    }


class Flats:
    """Parameters, cut and put into flat tensors as ZeRO would."""

    def __init__(
        self, kind: str, cuts: dict[str, list[int]], gap: int = 0, rounding: str = "stochastic"
    ) -> None:
        weights = begin()
        self.slices: list[StateSlice] = []
        self.flats: list[torch.nn.Parameter] = []
        for number in range(1 + max(len(of) for of in cuts.values())):
            parts: list[tuple[str, int, int]] = []
            for name, numel in NUMELS.items():
                edges = [0, *cuts[name], numel]
                if number + 1 < len(edges):
                    parts.append((name, edges[number], edges[number + 1]))
            tensors: list[torch.Tensor] = []
            for name, first, last in parts:
                tensors += [weights[name][first:last], torch.zeros(gap).bfloat16()]
            flat = torch.nn.Parameter(torch.cat(tensors))
            self.flats.append(flat)
            at = 0
            for name, first, last in parts:
                self.slices.append(
                    StateSlice(
                        name=name,
                        start=first,
                        numel=last - first,
                        parameter_numel=NUMELS[name],
                        flat=flat,
                        flat_offset=at,
                    )
                )
                at += last - first + gap
        rule = find_optimizer(OptimConfig(kind=kind, rounding=Rounding(rounding)))
        groups: list[dict[str, Any]] = [{"params": self.flats}]
        self.optimizer = ConvertingOptimizer(groups, rule, dict(SETTINGS), seed=5)
        self.optimizer.place(self.slices)

    def train(self, steps: int) -> dict[str, torch.Tensor]:
        """The weights after some steps."""
        for step in range(steps):
            of_step = gradients(step)
            for flat in self.flats:
                flat.grad = torch.zeros_like(flat)
            for part in self.slices:
                assert part.flat.grad is not None
                values = of_step[part.name][part.start : part.start + part.numel]
                part.flat.grad[part.flat_offset :][: part.numel] = values
            self.optimizer.step()
        found: dict[str, torch.Tensor] = {n: torch.empty(k) for n, k in NUMELS.items()}
        for part in self.slices:
            found[part.name][part.start : part.start + part.numel] = part.view(part.flat).float()
        return found


def in_fp32(steps: int) -> dict[str, torch.Tensor]:
    """The weights of torch's AdamW."""
    weights = {name: torch.nn.Parameter(values.float()) for name, values in begin().items()}
    plain = torch.optim.AdamW(list(weights.values()), **SETTINGS)  # type: ignore[arg-type]
    for step in range(steps):
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient.float()
        plain.step()
    return {name: weight.detach() for name, weight in weights.items()}


WHOLE: dict[str, list[int]] = {"a": [], "b": [], "c": []}
#: Where two and three ranks cut; blocks of 256 stay whole, or only those of the second do.
IN_BLOCKS = {"a": [10240], "b": [], "c": [256, 512]}
ANYWHERE = {"a": [1001, 1003], "b": [3], "c": [511]}


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
@pytest.mark.parametrize(
    ("kind", "cuts"),
    [("adamw_bf16", IN_BLOCKS), ("adamw_bf16", ANYWHERE), ("adamw_8bit", IN_BLOCKS)],
)
def test_how_parameters_are_cut_changes_no_digit(
    kind: str, cuts: dict[str, list[int]], rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Flats(kind, WHOLE, rounding=rounding).train(6)
    monkeypatch.setattr(converting_optimizer, "CONVERTED_ELEMENTS", {"cpu": 512})
    cut = Flats(kind, cuts, gap=5, rounding=rounding).train(6)
    for name, expected in whole.items():
        assert torch.equal(cut[name], expected), name
    # The random bits are what differs between seeds, and nothing else may.
    other = Flats(kind, WHOLE, rounding=rounding)
    other.optimizer._seed = 6
    draws = rounding == "stochastic" or (rounding == "kahan" and kind == "adamw_bf16")
    assert torch.equal(other.train(6)["a"], whole["a"]) != draws


@pytest.mark.parametrize(
    ("kind", "rounding", "limit"),
    [
        ("adamw_bf16", "stochastic", 0.04),
        ("adamw_bf16", "kahan", 0.04),
        ("adamw_8bit", "stochastic", 0.08),
    ],
)
def test_the_weights_move_as_in_fp32(kind: str, rounding: str, limit: float) -> None:
    """The mean movement along that of fp32; what bf16 adds to it is noise without direction."""
    start, expected = begin()["a"].float(), in_fp32(40)["a"]
    found = Flats(kind, WHOLE, rounding=rounding).train(40)["a"]
    moved, right = found - start, expected - start
    assert abs(float((moved * right).sum() / (right * right).sum()) - 1) < limit


def test_rounded_to_the_nearest_they_do_not() -> None:
    start, expected = begin()["a"].float(), in_fp32(40)["a"]
    found = Flats("adamw_bf16", WHOLE, rounding="nearest").train(40)["a"]
    right = expected - start
    share = float(((found - start) * right).sum() / (right * right).sum())
    assert share < 0.8
    # Of the weights that are large beside the rate, none moves.
    large = start.abs() > 1
    assert (found[large] == start[large]).float().mean() > 0.9


def test_kahans_sum_is_that_of_fp32() -> None:
    flats = Flats("adamw_bf16", WHOLE, rounding="kahan")
    flats.train(40)
    expected = in_fp32(40)
    state = flats.optimizer.state[flats.flats[0]]
    total = flats.flats[0].detach().float() + state["compensation"].float()
    for part in flats.slices:
        apart = (part.view(total) - expected[part.name]).abs().max()
        # 40 steps of 1e-3; the moments are bf16.
        assert apart < 2e-3


def test_a_second_moment_decays_that_the_nearest_would_hold() -> None:
    """Where no gradient comes any more: 0.999 of a bf16 number is, to the nearest, the number."""
    moments = {}
    for rounding in ("stochastic", "nearest"):
        flats = Flats("adamw_bf16", WHOLE, rounding=rounding)
        flats.train(1)
        flat = flats.flats[0]
        before = flats.optimizer.state[flat]["exp_avg_sq"].float().clone()
        for _ in range(100):
            flat.grad = torch.zeros_like(flat)
            flats.optimizer.step()
        after = flats.optimizer.state[flat]["exp_avg_sq"].float()
        moments[rounding] = float(after.sum() / before.sum())
    assert moments["nearest"] == 1.0
    assert moments["stochastic"] == pytest.approx(0.999**100, rel=0.02)


def test_blocks_are_of_parameters_and_pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting_optimizer, "CONVERTED_ELEMENTS", {"cpu": 512})
    flats = Flats("adamw_8bit", ANYWHERE, gap=5)
    flats.train(3)
    for flat in flats.flats:
        stored = flats.optimizer.state[flat]["exp_avg_sq"]
        assert isinstance(stored, Blocks)
        parts = [part for part in flats.slices if part.flat is flat]
        pieces = [flats.optimizer.piece_of(part) for part in parts]
        assert [piece.block for piece in pieces[1:]] == [
            piece.block + piece.blocks for piece in pieces[:-1]
        ]
        assert len(stored.codes) == pieces[-1].block + pieces[-1].blocks
        assert stored.codes.shape == (len(stored.scales), BLOCK_ELEMENTS)
        assert (decode_blocks(stored.codes, stored.scales, UNSIGNED_8BIT) >= 0).all()


def test_a_group_of_padding_is_left_alone() -> None:
    rule = find_optimizer(OptimConfig(kind="adamw_8bit"))
    padding = torch.nn.Parameter(torch.zeros(4).bfloat16())
    padding.grad = torch.zeros_like(padding)
    optimizer = ConvertingOptimizer([{"params": [padding]}], rule, dict(SETTINGS), seed=0)
    optimizer.place([])
    optimizer.step()
    assert not optimizer.state


def test_paged_states_are_those_of_8_bits_in_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append(shape)
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr(converting_optimizer, "paged_zeros", zeros)
    known = Flats("adamw_8bit", ANYWHERE).train(4)
    assert asked == []
    paged = Flats("adamw_paged_8bit", ANYWHERE)
    for name, expected in paged.train(4).items():
        assert torch.equal(known[name], expected), name
    stored = [
        blocks
        for state in paged.optimizer.state.values()
        for blocks in state.values()
        if isinstance(blocks, Blocks)
    ]
    assert asked == [tuple(t.shape) for blocks in stored for t in (blocks.codes, blocks.scales)]
