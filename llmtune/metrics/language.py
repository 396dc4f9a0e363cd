"""Metrics of language models, over the trained tokens of all rows."""

from __future__ import annotations

import math


def language_metrics(loss: float, correct: int, tokens: int) -> dict[str, float]:
    """Return perplexity and token accuracy; empty without tokens.

    Args:
        loss: Mean cross entropy of the tokens, in nats.
        correct: Tokens that have the largest logit.
        tokens: Trained tokens, which both means are over.
    """
    if not tokens:
        return {}
    return {
        "eval_perplexity": perplexity(loss),
        "eval_token_accuracy": correct / tokens,
    }


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
