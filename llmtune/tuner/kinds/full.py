"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import ClassVar

from llmtune.tuner.tuner import TUNERS, Tuner


class FullTuner(Tuner):
    """Train every parameter of the model."""

    name = "full"
    title = "full fine-tuning"
    trains_all = True
    #: As in published recipes.
    learning_rates: ClassVar = [(1e9, 5e-5), (float("inf"), 1e-5)]


TUNERS.register(FullTuner())
