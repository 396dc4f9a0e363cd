"""Metrics of language models, from sums over the trained tokens of all rows."""

from __future__ import annotations

import math


def language_metrics(loss_sum: float, correct: int, tokens: int) -> dict[str, float]:
    """Return loss, perplexity and token accuracy; empty without tokens.

    Args:
        loss_sum: Cross entropy in nats, summed over the tokens.
        correct: Tokens that have the largest logit.
        tokens: Trained tokens, which every mean is over.
    """
    if not tokens:
        return {}
    loss = loss_sum / tokens
    return {
        "eval_loss": loss,
        "eval_perplexity": perplexity(loss),
        "eval_token_accuracy": correct / tokens,
    }


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
