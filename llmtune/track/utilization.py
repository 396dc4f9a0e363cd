"""The share of the GPUs' arithmetic that a run reaches: MFU and HFU.

Both are defined in "PaLM" (Chowdhery et al. 2022, appendix B): operations of the model per token,
times tokens per second, over the peak of all cards. HFU also counts what is computed a second time
for the backward pass. Weights that are frozen have no gradient, which is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.config.schema import Precision
from llmtune.plan.plan import Plan
from llmtune.plan.speed import step_flops


@dataclass(frozen=True, slots=True)
class Utilization:
    """The cost of a token and the rate of the cards; zeros where they are not known."""

    model_flops: float = 0.0
    """Operations per token of a step, without recomputation."""
    computed_flops: float = 0.0
    """Those that are carried out."""
    peak: float = 0.0
    """Operations per second of all cards, in the run's precision."""

    def shares(self, tokens_per_second: float) -> dict[str, float]:
        """Return ``mfu`` and ``hfu``, 0 to 1; nothing on a CPU, whose peak is only assumed."""
        if not self.peak:
            return {}
        share = tokens_per_second / self.peak
        return {"mfu": share * self.model_flops, "hfu": share * self.computed_flops}


def find_utilization(plan: Plan, length: int, precision: Precision) -> Utilization:
    """Find what is needed to tell how well a run uses its GPUs.

    Args:
        length: Tokens of a row, on average.
    """
    hardware = plan.hardware
    if hardware.accelerator == "cpu":
        return Utilization()
    is_fp32 = precision is Precision.fp32
    card = (hardware.fp32_flops or hardware.flops / 2) if is_fp32 else hardware.flops
    return Utilization(
        model_flops=step_flops(plan.shape, length, 0.0),
        computed_flops=step_flops(plan.shape, length, plan.recomputed.share),
        peak=card * plan.world_size,
    )
