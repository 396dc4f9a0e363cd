"""The metrics of a language model are means over its trained tokens."""

from __future__ import annotations

import math

import pytest

from llmtune.metrics.language import language_metrics


def test_they_are_means_over_tokens() -> None:
    assert language_metrics(1.5, 1, 4) == {
        "eval_perplexity": pytest.approx(math.e**1.5),
        "eval_token_accuracy": 0.25,
    }


def test_a_perplexity_that_overflows_is_infinite_and_no_token_has_nothing() -> None:
    assert language_metrics(1e6, 0, 1)["eval_perplexity"] == math.inf
    assert language_metrics(0.0, 0, 0) == {}
