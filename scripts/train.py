"""Train under a launcher: ``deepspeed scripts/train.py ...`` or ``torchrun --nproc_per_node N
scripts/train.py ...``.

Started by itself it is ``python -m llmtune train``.
"""

import sys

from llmtune.cli.main import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
