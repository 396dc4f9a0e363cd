"""Named random draws: each is a function of the run's seed, its name and a position alone.

So no draw changes because another one was added, was made in another order, or was made before a
resume.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Stored in every checkpoint. Raise it when any draw changes: runs that began with the old draws
#: are then refused.
DRAWS_VERSION = 3


class Draw(StrEnum):
    """The name of a draw; its position is given in brackets."""

    source_rows = "source_rows"
    """The rows that ``limit`` takes of a source. [hash of what is in its files]"""
    eval_rows = "held_out"
    """The rows that ``data.val_set_size`` splits off for evaluation."""
    share = "share"
    """The rows of a source that are taken once more than the others. [number of the source]"""
    packing = "packing"
    """The order in which documents are put into packed rows. [window of a stream]"""
    order = "order"
    """The order of the rows. [epoch]"""
    window_order = "window_order"
    """The order of the rows of a stream. [window]"""
    padding = "padding"
    """The rows on which the cost of padding is measured."""
    adapter = "adapter"
    """The first weights of an adapter."""
    head = "head"
    """The first weights of a head that the model's files lack."""
    packing_probe = "packing_probe"
    """The documents with which packing is tried on a model, the same in every run."""
    kernel_check = "kernel_check"
    """The numbers with which faster kernels are compared with the plain ones. [rank of a LoRA]"""
    dropout = "dropout"
    """The elements that dropout leaves out, and noise on embeddings. [steps done, rank]"""
    rounding = "rounding"
    """The direction in which a number is rounded to bf16. [step, name of the parameter]"""
    answer = "answer"
    """The tokens of a sampled answer. [row]"""
    trial = "trial"
    """The settings of a trial of a sweep. [number of the trial, try]"""


def generator(seed: int, draw: Draw, *position: int) -> np.random.Generator:
    """Return a generator for one draw."""
    return np.random.default_rng(_entropy(seed, draw, position))


def draw_rows(rows: int, count: int, seed: int, draw: Draw, *position: int) -> NDArray[np.int64]:
    """Draw ``count`` different row numbers below ``rows``. Shape (count,)."""
    return generator(seed, draw, *position).permutation(rows)[:count].astype(np.int64)


def draw_shares(count: int, seed: int, draw: Draw, *position: int) -> NDArray[np.float64]:
    """Draw numbers in [0, 1). Shape (count,)."""
    return generator(seed, draw, *position).random(count)


def torch_seed(seed: int, draw: Draw, *position: int | str) -> int:
    """Return a seed for ``torch.manual_seed``, below 2**63."""
    return _entropy(seed, draw, position) >> 65


def _entropy(seed: int, draw: Draw, position: tuple[int | str, ...]) -> int:
    # A hash of the text, since numpy takes [seed, 1] and [seed, 1, 0] for the same seed.
    text = f"{draw.value} {seed} {' '.join(map(str, position))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
