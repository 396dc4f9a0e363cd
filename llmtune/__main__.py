"""``python -m llmtune [VERB] [overrides]``."""

from llmtune.security.working_folder import leave_working_folder

if __name__ == "__main__":
    # Before anything else is imported.
    leave_working_folder()
    from llmtune.cli.main import run

    run()
