"""Rules over the whole config: one function per topic, whose problems are reported together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from llmtune.config.best_model import find_best_model_problems
from llmtune.config.groups.data import DataConfig
from llmtune.config.groups.rope_scaling import find_rope_problems
from llmtune.config.groups.train import TrainConfig
from llmtune.config.groups.zero import OffloadDevice
from llmtune.config.schema import Config, Precision
from llmtune.config.value_rules import find_value_problems


def find_problems(config: Config) -> list[str]:
    """Return every broken rule, in words a user can act on."""
    return [
        *find_value_problems(config),
        *find_rope_problems(config.model.rope_scaling),
        *_find_offload_problems(config),
        *_find_schedule_problems(config),
        *_find_batch_schedule_problems(config.train),
        *_find_data_problems(config.data),
        *_find_input_problems(config.predict.input),
        *_find_streaming_problems(config),
        *find_best_model_problems(config),
    ]


#: (optimizer, param) that are rungs of the ladder.
_PLACEMENTS = (
    ("auto", "auto"),
    ("none", "none"),
    ("cpu", "none"),
    ("cpu", "cpu"),
    ("nvme", "none"),
    ("nvme", "nvme"),
    ("cpu", "nvme"),
)


def _find_offload_problems(config: Config) -> Iterator[str]:
    yield from _find_stage_problems(config)
    optimizer, param = config.offload.optimizer.value, config.offload.param.value
    if (optimizer, param) not in _PLACEMENTS:
        yield (
            f"offload.optimizer={optimizer} with offload.param={param} is no placement of the"
            " ladder: take offload=none, optimizer_cpu, cpu, optimizer_nvme, nvme or auto"
        )
    has_nvme = config.offload.nvme_path is not None or config.hardware.nvme_bytes is not None
    if "nvme" in (optimizer, param) and not has_nvme:
        yield (
            "offload on NVMe needs a folder on a fast local disk: add offload.nvme_path=/path (or"
            " hardware.nvme_bytes= to plan for another machine)"
        )
    is_named = (optimizer, param) not in (("none", "none"), ("auto", "auto"))
    if is_named and config.precision is Precision.fp16:
        yield "offload with precision=fp16 is not supported: use precision=bf16"


def _find_stage_problems(config: Config) -> Iterator[str]:
    stage, offload = config.zero.stage, config.offload
    if offload.param in (OffloadDevice.cpu, OffloadDevice.nvme) and stage in (0, 1, 2):
        yield (
            f"offload.param={offload.param.value} needs zero=3 (zero.stage is {stage}): DeepSpeed"
            " ignores it below stage 3; add zero=3, or offload=optimizer_cpu"
        )
    if offload.optimizer is OffloadDevice.nvme and stage in (0, 1, 2):
        yield (
            f"offload.optimizer=nvme needs zero=3 (zero.stage is {stage}): add zero=3, or"
            " offload=optimizer_cpu"
        )
    if offload.optimizer is OffloadDevice.cpu and stage == 0:
        yield (
            "offload.optimizer needs zero=1 or higher (zero.stage is 0): add zero=1, or"
            " offload=none"
        )


def _find_schedule_problems(config: Config) -> list[str]:
    steps, total = config.schedule.warmup_steps, config.train.max_steps
    if steps is not None and total is not None and steps >= total:
        return [f"schedule.warmup_steps={steps} leaves nothing of train.max_steps={total}"]
    return []


def _find_batch_schedule_problems(train: TrainConfig) -> Iterator[str]:
    """Find what is wrong with the schedule of batch sizes.

    A schedule grows, as in Megatron-LM's ``--rampup-batch-size``; a size that shrinks or repeats
    is taken for a mistake.
    """
    schedule = train.batch_schedule
    if schedule is None:
        return
    shown = f"train.batch_schedule={schedule}"
    if not schedule or any(len(entry) != 2 for entry in schedule):
        yield f"{shown}: a list of pairs, where a size begins and the size, as in [[0,8],[500,16]]"
        return
    if schedule[0][0] != 0:
        yield f"{shown}: the first size must begin at 0, not at {schedule[0][0]}"
    for start, rows in schedule:
        if rows <= 0:
            yield f"{shown}: {rows} rows from {start} on: a size must be above 0"
    unit = train.batch_schedule_unit.value
    for (before, fewer), (start, rows) in pairwise(schedule):
        if start <= before:
            yield f"{shown}: {rows} rows begin at {start} {unit}, which must be above {before}"
        if 0 < rows <= fewer:
            yield (
                f"{shown}: {rows} rows from {start} {unit} on are no more than the {fewer} before:"
                " sizes must grow"
            )
    first, fixed = schedule[0][1], train.global_batch_size
    if fixed not in ("auto", first):
        yield (
            f"train.global_batch_size={fixed} contradicts train.batch_schedule, which begins with"
            f" {first} rows: leave train.global_batch_size out"
        )


def _find_data_problems(data: DataConfig) -> Iterator[str]:
    if not _are_sources(data.train):
        yield f"data.train={data.train}: a file name, a mapping with path, or a list of them"
    if data.eval is not None and not _are_sources(data.eval):
        yield f"data.eval={data.eval}: a file name, a mapping with path, or a list of them"
    if isinstance(data.val_set_size, float) and data.val_set_size >= 1:
        yield (f"data.val_set_size={data.val_set_size}: a share below 1, or a whole number of rows")
    if data.format != "auto" and data.train == "stdlib_docs":
        yield "data.format is for files; stdlib_docs has its own"
    if not 0 <= data.max_overlong_share <= 1:
        yield f"data.max_overlong_share={data.max_overlong_share}: a share between 0 and 1"
    workers = data.num_workers
    if workers != "auto" and not (isinstance(workers, int) and workers >= 0):
        yield f"data.num_workers={workers}: 'auto', or an integer of at least 0"
    if data.pin_memory not in ("auto", True, False):
        yield f"data.pin_memory={data.pin_memory}: 'auto', true or false"


def _find_input_problems(value: Any) -> Iterator[str]:
    if value is not None and not _are_sources(value):
        yield f"predict.input={value}: a file name, a mapping with path, or a list of them"


def _are_sources(value: Any) -> bool:
    sources = value if isinstance(value, list) and value else [value]
    return all(isinstance(source, str | dict) and source for source in sources)


def _find_streaming_problems(config: Config) -> Iterator[str]:
    data = config.data
    if not data.streaming:
        return
    if config.train.max_steps is None:
        yield "data.streaming=true needs train.max_steps: a stream does not know its length"
    if data.eval is None and data.val_set_size:
        yield "data.streaming=true splits nothing off: add data.eval=FILE, or data.val_set_size=0"
