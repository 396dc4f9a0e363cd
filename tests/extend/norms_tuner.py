"""A tuner of one's own: train the norms and biases, and nothing else."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtune.tuner.tuner import TUNERS, Tuner


class NormsTuner(Tuner):
    """Train the parameters of one dimension (https://arxiv.org/abs/2106.10199 trains biases)."""

    name = "norms"
    title = "training of norms"
    learning_rates: ClassVar = [(float("inf"), 1e-2)]

    def trains(self, name: str, parameter: Any) -> bool:
        """Norms and biases."""
        # Under ZeRO 3 a parameter's own shape is that of this rank's slice.
        return len(getattr(parameter, "ds_shape", parameter.shape)) == 1


TUNERS.register(NormsTuner())
