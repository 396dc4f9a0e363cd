"""The default peak learning rate, by tuner, size of the model and optimizer."""

from __future__ import annotations

from llmtune.config.groups.optim import OptimConfig
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.tuner.tuner import Tuner


def resolve_learning_rate(
    optim: OptimConfig, tuner: Tuner, parameters: int, notes: list[str]
) -> float:
    """Return the rate that is set, or the tuner's for a model of this size, and note its origin."""
    if not isinstance(optim.learning_rate, str):
        return float(optim.learning_rate)
    rate = next(rate for limit, rate in tuner.learning_rates if parameters < limit)
    optimizer = find_optimizer(optim)
    origin = f"auto: {tuner.name}, {parameters / 1e9:.2g} B parameters"
    if optimizer.learning_rate_scale != 1.0:
        rate *= optimizer.learning_rate_scale
        origin += f", {optimizer.learning_rate_scale:g} of AdamW's for {optimizer.title}"
    notes.append(f"learning rate: {rate:g} ({origin})")
    return rate
