"""Train under a launcher: ``deepspeed scripts/train.py ...`` or ``torchrun --nproc_per_node N scripts/train.py ...``.

Started by itself it is ``python -m llmtune train``.
"""

import sys

from llmtune.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
