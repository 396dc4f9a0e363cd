"""Find problems of the configuration that only the readers of a key can see.

The rules of ``llmtune.config.rules`` know keys; here sources, sizes and addresses are read by the
code that uses them, before anything is prepared or planned, so that all problems are in one report
and ``plan`` refuses what ``train`` refuses.
"""

from collections.abc import Callable, Iterator

from llmtune.config.groups.export import MergeOnto
from llmtune.config.groups.optim import OptimConfig
from llmtune.config.groups.zero import OffloadDevice
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.export.formats.format import find_format
from llmtune.optimizer.optimizer import Optimizer, find_optimizer
from llmtune.optimizer.param_groups import entry_key, find_entry_problems
from llmtune.plan.architecture.rope_scaling import find_rope_problems
from llmtune.registry import NONE
from llmtune.track.service import find_service_problems
from llmtune.train.schedule import SCHEDULES
from llmtune.tuner.pattern_limits import pattern_problem
from llmtune.tuner.tuner import TUNERS


def find_problems(config: Config) -> list[str]:
    """Find what training would refuse on every machine, in words that a user can act on.

    No file of data is opened.
    """
    found = list(find_rope_problems(config.model.rope_scaling))
    found += find_service_problems(config.tracker)
    for check in _CHECKS:
        try:
            check(config)
        except ConfigError as error:
            found.append(str(error))
    for find in (_find_tuner_problems, _find_optimizer_problems, _find_schedule_problems):
        try:
            found += find(config)
        except ConfigError as error:
            found.append(str(error))
    return found


def _check_data(config: Config) -> None:
    from llmtune.data.settings import check_data_settings

    check_data_settings(config.data)


def _check_launch(config: Config) -> None:
    from llmtune.config.byte_sizes import parse_bytes

    launch = config.launch
    if launch.memory_limit is not None:
        parse_bytes(launch.memory_limit, "launch.memory_limit")
    if launch.hostfile is not None and launch.nproc is not None:
        raise ConfigError(
            f"launch.nproc={launch.nproc}: with launch.hostfile the file says how many ranks, as"
            " slots=N"
        )


def _find_optimizer_problems(config: Config) -> list[str]:
    optim, optimizer = config.optim, find_optimizer(config.optim)
    problems = list(_find_group_problems(optim, optimizer))
    problems += optimizer.find_problems(optim, config.precision)
    stage, device = config.zero.stage, config.offload.optimizer
    if stage == "auto":
        # Every optimizer is on the accelerator in one of its stages; offload needs ZeRO.
        is_offloaded = device not in (OffloadDevice.auto, OffloadDevice.none)
        stage = max(optimizer.stages[-1], int(is_offloaded))
    obstacle = optimizer.find_obstacle(
        int(stage), "none" if device is OffloadDevice.auto else device.value
    )
    if obstacle is not None:
        problems.append(f"optim={optimizer.name}: {obstacle}")
    return problems


def _find_group_problems(optim: OptimConfig, optimizer: Optimizer) -> Iterator[str]:
    yield from find_entry_problems(optim)
    for index, entry in enumerate(optim.param_groups):
        pattern, decay = entry.get("pattern"), entry.get("weight_decay")
        if isinstance(pattern, str) and (problem := pattern_problem(pattern)):
            yield f"{entry_key(index)}.pattern={pattern}: {problem}"
        if decay is not None and "weight_decay" not in optimizer.reads:
            yield (
                f"{entry_key(index)}.weight_decay={decay}: {optimizer.title} does not read it;"
                " leave it out"
            )


def _find_tuner_problems(config: Config) -> list[str]:
    tuner = TUNERS.find(config.tuner.kind)
    problems = tuner.find_problems(config.tuner)
    offload = (config.offload.optimizer, config.offload.param)
    if offload == (OffloadDevice.nvme, OffloadDevice.none) and not tuner.trains_all:
        problems.append(
            f"offload=optimizer_nvme with tuner={tuner.name} is pointless: the optimizer of what it"
            " trains is small. Take offload=optimizer_cpu, or offload=nvme for the weights"
        )
    if not tuner.has_adapter and config.export.format == "adapter":
        problems.append(f"export=adapter: {tuner.title} has no adapter; take export=safetensors")
    if not tuner.has_adapter and config.export.merge_onto is MergeOnto.nf4:
        problems.append(
            f"export.merge_onto=nf4: {tuner.title} has no adapter to merge; the key is for QLoRA"
        )
    if config.export.format != NONE and find_format(config.export.format).is_merged:
        problem = tuner.find_merge_problem(config.tuner, config.export.merge_onto)
        problems += [problem] if problem else []
    return problems


def _find_schedule_problems(config: Config) -> list[str]:
    schedule = SCHEDULES.find(config.schedule.lr_scheduler_type)
    problems = schedule.find_problems(config.schedule)
    if not problems:
        schedule.check_settings(config.schedule, config.train.max_steps)
    return problems


def _check_export(config: Config) -> None:
    """Check that the export can be written, which would fail only after the training."""
    if config.export.format == NONE:
        return
    if (problem := find_format(config.export.format).find_problems(config.export)) is not None:
        raise ConfigError(problem)


def _check_upload(config: Config) -> None:
    from llmtune.export.prerequisites import check_address

    check_address(config.export)


def _check_mirror(config: Config) -> None:
    mirror = config.checkpoint.mirror
    if mirror is not None:
        from llmtune.storage.remote import check_protocol

        check_protocol(mirror, "checkpoint.mirror")


_CHECKS: tuple[Callable[[Config], None], ...] = (
    _check_data,
    _check_launch,
    _check_export,
    _check_upload,
    _check_mirror,
)
