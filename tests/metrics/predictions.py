"""Random predictions, with ties, and with classes that nobody predicts or that do not occur."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st


@dataclass
class Draws:
    """A generator, and how many rows and columns it is to draw."""

    generator: np.random.Generator
    rows: int
    columns: int

    def scores(self) -> torch.Tensor:
        """Draw scores of shape (rows, columns): rounded ones have ties, up to constant columns."""
        scores = self.generator.normal(size=(self.rows, self.columns)) * 3
        scores = scores.round(int(self.generator.integers(0, 4)))
        # Some columns are never the largest, and some always the same.
        scores[:, self.generator.random(self.columns) < 0.2] -= 100
        scores[:, self.generator.random(self.columns) < 0.1] = 1.0
        dtype = [torch.float64, torch.float32, torch.bfloat16][int(self.generator.integers(3))]
        return torch.tensor(scores).to(dtype)

    def labels(self) -> torch.Tensor:
        """Draw classes of shape (rows,), of some of the columns."""
        count = int(self.generator.integers(1, self.columns + 1))
        allowed = self.generator.permutation(self.columns)[:count]
        return torch.tensor(self.generator.choice(allowed, self.rows))

    def sets(self) -> torch.Tensor:
        """Draw 0 or 1 of shape (rows, columns); some columns are all 0 or all 1."""
        shares = self.generator.choice([0.0, 0.1, 0.5, 0.9, 1.0], self.columns)
        return torch.tensor(self.generator.random((self.rows, self.columns)) < shares).long()


def draws(min_columns: int = 2, max_columns: int = 9) -> st.SearchStrategy[Draws]:
    """Sizes from one row on."""
    return st.builds(
        lambda seed, rows, columns: Draws(np.random.default_rng(seed), rows, columns),
        st.integers(0, 2**32),
        st.integers(1, 60),
        st.integers(min_columns, max_columns),
    )
