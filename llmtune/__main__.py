"""``python -m llmtune [VERB] [overrides]``."""

from llmtune.cli.main import run

if __name__ == "__main__":
    run()
