"""AdamW with master weights and moments in bf16: 8 bytes per trained parameter in ZeRO 3, not 16.

The master weights are the model's own weights there (:func:`llmtune.engine.deepspeed_fixes.
share_weights_with_masters`), so that 2 bytes are weight and master, 2 gradient, and 4 moments.

Rounded to the nearest, a weight keeps 8 bits, and an update below 1/512 of it is lost: at a
learning rate of 1e-5 nearly all. A second moment would not even decay, since a step takes one part
in a thousand of it. So both are rounded stochastically (``optim.rounding``).
"""

from __future__ import annotations

from llmtune.optimizer.bf16_master import make_adamw
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.optimizer.storage import BF16

OPTIMIZERS.register(
    make_adamw(
        name="adamw_bf16",
        title="AdamW in bf16",
        mean=BF16,
        square=BF16,
        # Four numbers to fp32 and back, the rule's eight kernels, and the random bits.
        kernel_bytes=24 + 80 + 210,
    )
)
