"""Sample tokens by numbers that are drawn before, one for each token of each row."""

from __future__ import annotations

from typing import Any

import torch


def make_sampler(draws: torch.Tensor, length: int, temperature: float, top_p: float) -> Any:
    """Make a ``LogitsProcessor`` that leaves one token per row, which is then the likeliest.

    The token is the first at which the summed probabilities exceed the row's number of this step:
    inverse transform sampling. So a token depends on its own row, and neither on the batch nor on
    what was drawn before.

    Args:
        draws: Numbers in [0, 1). Shape (rows, steps).
        length: Tokens of the padded prompts.
        temperature: Divides the logits; above 0.
        top_p: Share of the probability that the likeliest tokens have among which one is drawn.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))

    def choose(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shares = warpers(input_ids, scores.float()).softmax(-1).double().cumsum(-1)  # type: ignore[arg-type]
        # Of the sum as it came out, so that rounding leaves no row without a token.
        number = draws[:, input_ids.shape[1] - length, None].double() * shares[:, -1:]
        token = torch.searchsorted(shares, number, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    return choose
