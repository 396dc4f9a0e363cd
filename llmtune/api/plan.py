"""``llmtune.plan``: memory and speed of every placement, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.api.overrides import Override, compose_verb

if TYPE_CHECKING:
    from llmtune.cli.plan import PlanResult


def plan(*overrides: Override, config_dir: str | None = None) -> PlanResult:
    """Plan a job on this machine, or on the one that ``hardware=`` names.

    It runs in this process. No weight is loaded, and no folder is made.

    Args:
        overrides: Texts such as ``"model=llama3_70b"``, or mappings such as
            ``{"data.max_seq_length": 512}``.
        config_dir: A folder with group files of your own, as ``--config-dir``.

    Returns:
        The ladder, which placement was chosen, and advice. ``str()`` of it is what ``plan`` prints,
        ``to_json()`` what ``plan --json`` does. A job that fits nowhere is no error: ``fits`` is
        false, and ``misfit`` says what is missing.

    Raises:
        ConfigError: With every problem of the configuration.
        MissingPrerequisiteError: The model's configuration cannot be had.
    """
    composed = compose_verb("plan", overrides, config_dir)
    from llmtune.cli.output import quieted_libraries
    from llmtune.cli.plan import make_plan

    with quieted_libraries():
        return make_plan(composed)
