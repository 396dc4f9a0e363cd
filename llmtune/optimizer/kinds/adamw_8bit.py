"""AdamW with bf16 master weights and block-wise 8-bit moments: 6.03 bytes per trained parameter.

That is in ZeRO 3, where the master weights are the model's own weights: 2 bytes are weight and
master, 2 gradient, and 2.03 moments with their scales. With fp32 master weights they would be 10.

bitsandbytes' optimizers are not used: they round weights to the nearest, and count blocks from
wherever ZeRO has cut. Nor is its ``quantize_blockwise`` (0.50.2): on a CPU it does not find the
nearest code of a table other than its own, so that what is saved and loaded would change.
"""

from __future__ import annotations

from llmtune.config.groups.optim import Rounding
from llmtune.optimizer.adamw_rule import update_adamw
from llmtune.optimizer.bf16_master import BF16_MASTER_REASON, BF16_MASTER_STAGES, with_rounding
from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer
from llmtune.optimizer.storage import BF16, SIGNED_8BIT, UNSIGNED_8BIT

OPTIMIZERS.register(
    Optimizer(
        name="adamw_8bit",
        title="AdamW in 8 bits",
        states=("exp_avg", "exp_avg_sq"),
        storages={"exp_avg": SIGNED_8BIT, "exp_avg_sq": UNSIGNED_8BIT},
        master=BF16,
        rounding=Rounding.stochastic,
        variant=with_rounding,
        stages=BF16_MASTER_STAGES,
        stages_reason=BF16_MASTER_REASON,
        reads=("betas", "eps", "weight_decay", "rounding"),
        update=update_adamw,
        # Two numbers to fp32 and back, the rule's eight kernels, the random bits of the weight, and
        # the codes of two moments: their scale, quotient, bits, table and product.
        kernel_bytes=12 + 80 + 100 + 2 * 60,
    )
)
