"""AdamW with bf16 master weights and block-wise 8-bit moments: 6.03 bytes per trained parameter.

That is in ZeRO 3, where the master weights are the model's own weights: 2 bytes are weight and
master, 2 gradient, and 2.03 moments with their scales. With fp32 master weights they would be 10.

bitsandbytes' optimizers are not used: they round weights to the nearest, and count blocks from
wherever ZeRO has cut. Nor is its ``quantize_blockwise`` (0.50.2): on a CPU it does not find the
nearest code of a table other than its own, so that what is saved and loaded would change.
"""

from __future__ import annotations

from llmtune.optimizer.bf16_master import make_adamw
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.optimizer.storage import SIGNED_8BIT, UNSIGNED_8BIT

ADAMW_8BIT = make_adamw(
    name="adamw_8bit",
    title="AdamW in 8 bits",
    mean=SIGNED_8BIT,
    square=UNSIGNED_8BIT,
    # Two numbers to fp32 and back, the rule's eight kernels, the random bits of the weight, and the
    # codes of two moments: their scale, quotient, bits, table and product.
    kernel_bytes=12 + 80 + 100 + 2 * 60,
)

OPTIMIZERS.register(ADAMW_8BIT)
