"""Stochastic rounding: its mean is right, and its bits follow from where an element is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from llmtune.engine.rounding import RandomBits, Run, round_stochastically, rounding_key

CPU = torch.device("cpu")


def bits_of(first: int, numel: int, key: int = rounding_key(0, 1, "w")) -> RandomBits:
    return RandomBits([Run(key=key, first=first, numel=numel)], CPU)


def round_once(values: torch.Tensor, key: int) -> torch.Tensor:
    return round_stochastically(values.clone(), bits_of(0, len(values), key).take()).float()


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8), (100, 101, 102, 103), (4, 500)])
def test_bits_do_not_depend_on_how_a_parameter_is_cut(cuts: tuple[int, ...]) -> None:
    whole, edges = bits_of(0, 1000), [0, *cuts, 1000]
    parts = [bits_of(first, last - first) for first, last in pairwise(edges)]
    key = rounding_key(0, 1, "w")
    runs = [
        Run(key=key, first=first, numel=last - first, gap=3 * (first > 0))
        for first, last in pairwise(edges)
    ]
    together = RandomBits(runs, CPU)
    for _ in range(3):
        expected = whole.take()
        assert torch.equal(torch.cat([part.take() for part in parts]), expected)
        inside, at = together.take(), 0
        for run in runs:
            at += run.gap
            assert torch.equal(
                inside[at : at + run.numel], expected[run.first : run.first + run.numel]
            )
            at += run.numel


def test_each_step_parameter_seed_and_draw_has_bits_of_its_own() -> None:
    keys = {
        rounding_key(seed, step, name)
        for seed in range(3)
        for step in range(3)
        for name in ("a", "b", "a.b")
    }
    assert len(keys) == 27
    assert all(0 <= key < 2**62 for key in keys)
    drawn = [bits_of(0, 4000, key) for key in sorted(keys)]
    seen = torch.stack([one.take() for one in drawn for _ in range(3)]).double()
    correlations = torch.corrcoef(seen) - torch.eye(len(seen))
    # Five and a half standard deviations of 4,000 independent pairs.
    assert correlations.abs().max() < 5.5 / 4000**0.5


def test_bits_are_uniform() -> None:
    bits = bits_of(0, 2**18)
    for _ in range(3):
        drawn = bits.take()
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) in range(2**16 - 100, 2**16)
        counts = torch.bincount(drawn // 2**8, minlength=256).double()
        # 1,024 a bin, with a standard deviation of 32.
        assert (counts - 1024).abs().max() < 6 * 32


def test_the_mean_of_a_rounded_number_is_the_number() -> None:
    values = torch.linspace(-3, 3, 999) * 1.000123
    keys = [rounding_key(0, step, "w") for step in range(2000)]
    mean = torch.stack([round_once(values, key) for key in keys]).double().mean(dim=0)
    nearest = values.bfloat16().double()
    gap = 2**-7 * values.abs().double()
    assert ((mean - values).abs() <= 5.5 * gap / 2 / 2000**0.5 + 1e-7).all()
    # Rounded to the nearest, some are far from it: the test can fail.
    assert ((nearest - values).abs() > 5.5 * gap / 2 / 2000**0.5).any()


def test_a_number_becomes_one_of_its_neighbors_and_stays_what_bf16_has() -> None:
    values = torch.randn(4096) * torch.randn(4096).exp()
    rounded = round_once(values, rounding_key(0, 1, "w"))
    lower = (values.view(torch.int32) & -(2**16)).view(torch.float32)
    upper = ((values.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    assert ((rounded == lower) | (rounded == upper)).all()
    assert torch.equal(round_once(lower, rounding_key(0, 1, "w")), lower)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    assert torch.equal(round_once(special[:4], 5), special[:4])
    assert round_once(special, 5)[4].isnan()
