"""AdamW in 8 bits, with moments in memory that CUDA's driver moves to the host when a GPU is full.

The digits, the bytes and what a checkpoint holds are those of ``adamw_8bit``. A peak that is larger
than planned, of a long row or of another program on the card, costs time where it would have ended
the run. Ranks on CPUs, and a rung that has the optimizer in host memory, page nothing.
"""

from __future__ import annotations

from dataclasses import replace

from llmtune.optimizer.kinds.adamw_8bit import ADAMW_8BIT
from llmtune.optimizer.optimizer import OPTIMIZERS

OPTIMIZERS.register(
    replace(ADAMW_8BIT, name="adamw_paged_8bit", title="AdamW in 8 bits, paged", is_paged=True)
)
