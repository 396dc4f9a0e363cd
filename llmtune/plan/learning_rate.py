"""The default peak learning rate, by the tuner and the size of the model."""

from llmtune.config.groups.optim import OptimConfig
from llmtune.tuner.tuner import Tuner


def resolve_learning_rate(
    optim: OptimConfig, tuner: Tuner, parameters: int, notes: list[str]
) -> float:
    """Return the rate that is set, or the tuner's for a model of this size, and note its origin."""
    if not isinstance(optim.learning_rate, str):
        return float(optim.learning_rate)
    rate = next(rate for limit, rate in tuner.learning_rates if parameters < limit)
    notes.append(
        f"learning rate: {rate:g} (auto: {tuner.name}, {parameters / 1e9:.2g} B parameters)"
    )
    return rate
