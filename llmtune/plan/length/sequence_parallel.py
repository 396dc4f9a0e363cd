"""Check whether ranks can share the tokens of a row (``launch.sequence_parallel_size``)."""

from __future__ import annotations

from llmtune.config.groups.train import Compile
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.plan.memory.shapes import ModelShape
from llmtune.units import counted
from llmtune.varlen_attention import VARLEN


def check_sequence_parallel(
    config: Config, shape: ModelShape, kernel: str, world_size: int
) -> None:
    """Refuse what cannot be cut among ranks.

    Args:
        kernel: The attention kernel of the run.

    Raises:
        ConfigError: With what to take instead.
    """
    count = config.launch.sequence_parallel_size
    if count == 1:
        return
    asked, name = f"launch.sequence_parallel_size={count}", config.model.name_or_path
    without = "or leave launch.sequence_parallel_size out"
    if world_size % count:
        raise ConfigError(
            f"{asked}: {counted(world_size, 'rank')} {'does' if world_size == 1 else 'do'} not"
            f" divide into groups of {count}; take one of"
            f" {[size for size in range(1, world_size + 1) if world_size % size == 0]}"
        )
    if shape.heads % count:
        raise ConfigError(
            f"{asked}: the {shape.heads} attention heads of {name} do not divide among {count}"
            f" ranks; take one of"
            f" {[size for size in range(1, shape.heads + 1) if shape.heads % size == 0]}"
        )
    if kernel != VARLEN:
        why = f"model.attn_implementation={kernel} does not"
        if VARLEN not in shape.kernels:
            why = f"{name} (model.task={shape.task}) has layers or a task that cannot do so"
        raise ConfigError(
            f"{asked} needs attention that is told the borders of documents"
            f" (model.attn_implementation={VARLEN}), and {why}; take"
            f" model.attn_implementation={VARLEN} (on a GPU in 16 bits), {without}"
        )
    if shape.dynamic_positions:
        raise ConfigError(
            f"{asked}: rotary positions of {name} depend on the length of the whole row, of which a"
            f" rank has only a part; take model.rope_scaling={{rope_type: yarn, factor: N}}"
            f" {without}"
        )
    if config.train.neftune_noise_alpha is not None:
        raise ConfigError(
            f"{asked}: the noise of train.neftune_noise_alpha depends on the length of a padded"
            f" row, and ranks have parts of rows; leave train.neftune_noise_alpha out, {without}"
        )
    if config.train.compile is not Compile.none:
        raise ConfigError(
            f"{asked}: compiled layers were not tried with tokens that ranks exchange; take"
            f" train.compile=none, {without}"
        )
