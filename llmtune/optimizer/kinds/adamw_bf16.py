"""AdamW with master weights and moments in bf16: 8 bytes per trained parameter in ZeRO 3, not 16.

The master weights are the model's own weights there (:func:`llmtune.engine.deepspeed_fixes.
share_weights_with_masters`), so that 2 bytes are weight and master, 2 gradient, and 4 moments.

Rounded to the nearest, a weight keeps 8 bits, and an update below 1/512 of it is lost: at a
learning rate of 1e-5 nearly all. A second moment would not even decay, since a step takes one part
in a thousand of it. So both are rounded stochastically (``optim.rounding``).
"""

from __future__ import annotations

from llmtune.config.groups.optim import Rounding
from llmtune.optimizer.adamw_rule import update_adamw
from llmtune.optimizer.bf16_master import BF16_MASTER_REASON, BF16_MASTER_STAGES, with_rounding
from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer
from llmtune.optimizer.storage import BF16

OPTIMIZERS.register(
    Optimizer(
        name="adamw_bf16",
        title="AdamW in bf16",
        states=("exp_avg", "exp_avg_sq"),
        storages={"exp_avg": BF16, "exp_avg_sq": BF16},
        master=BF16,
        rounding=Rounding.stochastic,
        variant=with_rounding,
        stages=BF16_MASTER_STAGES,
        stages_reason=BF16_MASTER_REASON,
        reads=("betas", "eps", "weight_decay", "rounding"),
        update=update_adamw,
        # Four numbers to fp32 and back, the rule's eight kernels, and the random bits.
        kernel_bytes=24 + 80 + 210,
    )
)
