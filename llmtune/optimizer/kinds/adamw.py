"""AdamW: Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer

#: torch's fused kernel on every device. It is as fast on a CPU as DeepSpeedCPUAdam (40 M parameters
#: on 2 cores: 14 to 20 ms against 20), needs no compiler, and resumes to the bit, which DeepSpeed's
#: kernel does not: that one keeps ``beta^t`` as a running product.
OPTIMIZERS.register(
    Optimizer(
        name="adamw",
        title="AdamW",
        states=("exp_avg", "exp_avg_sq"),
        built_with={"torch_adam": True, "fused": True},
    )
)
