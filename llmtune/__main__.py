"""``python -m llmtune [VERB] [overrides]``."""

import sys

from llmtune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
