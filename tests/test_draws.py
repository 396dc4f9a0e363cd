"""Random draws: none is another one's, and none changes by accident."""

from __future__ import annotations

import itertools

import numpy as np

from llmtune.draws import DRAWS_VERSION, Draw, draw_rows, generator, torch_seed


def test_no_two_draws_share_their_numbers() -> None:
    positions = [(), *itertools.product(range(3)), *itertools.product(range(3), range(3))]
    places = list(itertools.product((0, 1, 10, 2**40), Draw, positions))
    first = {
        (seed, draw, at): generator(seed, draw, *at).integers(2**63) for seed, draw, at in places
    }
    assert len(set(first.values())) == len(places)
    seeds = {torch_seed(seed, draw, *at) for seed, draw, at in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_draw_knows_nothing_of_what_was_drawn_before() -> None:
    again = generator(7, Draw.order, 3).permutation(50)
    generator(7, Draw.packing).permutation(50)
    np.random.seed(1)
    assert (generator(7, Draw.order, 3).permutation(50) == again).all()
    assert (draw_rows(50, 20, 7, Draw.order, 3) == again[:20]).all()


def test_draws_that_change_get_a_new_version() -> None:
    """What runs in progress rely on.

    Where this fails, raise ``DRAWS_VERSION`` and write down the new numbers.
    """
    found = {draw.value: draw_rows(100, 3, 42, draw, 1).tolist() for draw in Draw}
    assert found == {
        "source_rows": [23, 42, 48],
        "held_out": [7, 27, 36],
        "share": [74, 53, 97],
        "packing": [53, 70, 32],
        "order": [3, 52, 77],
        "window_order": [9, 44, 37],
        "padding": [73, 70, 64],
        "adapter": [94, 26, 22],
        "head": [71, 83, 7],
        "packing_probe": [84, 9, 5],
        "kernel_check": [82, 80, 70],
        "dropout": [21, 80, 65],
        "rounding": [19, 18, 54],
        "answer": [94, 7, 76],
        "trial": [32, 75, 55],
    }
    assert torch_seed(42, Draw.dropout, 5, 1) == 2212730291861137966
    assert DRAWS_VERSION == 3
