"""The peak learning rate where none is given: by what is trained and by the size of the model."""

from __future__ import annotations

from llmtune.config.schema import OptimConfig, TunerKind

#: (parameters below which it holds, rate). The larger two of LoRA and the last of full are what the
#: field's recipes use; the first of LoRA was tried on SmolLM2-135M (held-out loss after 56 steps:
#: 2.84 at 5e-4, 2.78 at 1e-3).
RATES: dict[TunerKind, list[tuple[float, float]]] = {
    TunerKind.lora: [(1e9, 1e-3), (20e9, 2e-4), (float("inf"), 1e-4)],
    TunerKind.full: [(1e9, 5e-5), (float("inf"), 1e-5)],
}


def resolve_learning_rate(
    optim: OptimConfig, tuner: TunerKind, parameters: int, notes: list[str]
) -> float:
    """The rate that is set, or the table's, with a note of where it came from."""
    if not isinstance(optim.learning_rate, str):
        return float(optim.learning_rate)
    rate = next(rate for limit, rate in RATES[tuner] if parameters < limit)
    notes.append(
        f"learning rate: {rate:g} (auto: {tuner.value}, {parameters / 1e9:.2g} B parameters)"
    )
    return rate
