"""Start the processes of a prediction, and wait until they have ended."""

from __future__ import annotations

import math
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from llmtune.errors import ERRORS_BY_CODE, ConfigError, LlmtuneError
from llmtune.launch.launchers.environment import restored_environment, set_defaults
from llmtune.launch.supervise.attempt import describe_ranks
from llmtune.launch.supervise.rank_group import RankGroup
from llmtune.launch.supervise.supervisor import POLL_SECONDS
from llmtune.model.weights.files import read_entries
from llmtune.plan.devices.gpus import visible_gpus
from llmtune.plan.devices.probe import resolve_accelerator
from llmtune.predict.request import PredictRequest
from llmtune.run.target import WEIGHTS_SHARE, Target
from llmtune.storage.rank_files import FailureReport
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.track.console import Console
from llmtune.track.status import Status


def count_processes(target: Target, windows: int) -> int:
    """Count the processes: ``launch.nproc``, else one per GPU that holds the whole model.

    Args:
        windows: Pieces of work; more processes would have nothing to do.

    Raises:
        ConfigError: More processes are asked for than there are GPUs.
    """
    asked = target.config.launch.nproc
    if resolve_accelerator(target.config.hardware.accelerator) == "cuda":
        gpus = visible_gpus()
        smallest = min(gpu.memory_bytes for gpu in gpus)
        # A model that one GPU does not hold is spread over all, by one process.
        if asked is None and _weight_bytes(target) < WEIGHTS_SHARE * smallest:
            asked = len(gpus)
        if asked is not None and asked > len(gpus):
            raise ConfigError(
                f"launch.nproc={asked}: there are {len(gpus)} GPUs, and each process of a"
                " prediction has one; leave it out"
            )
    return max(1, min(asked or 1, windows))


def _weight_bytes(target: Target) -> int:
    entries = read_entries(target.model_folder).values()
    size = configured_dtype(target.config.precision.value).itemsize
    return size * sum(math.prod(entry.shape) for entry in entries)


def run_processes(request: PredictRequest, world_size: int, console: Console) -> None:
    """Predict with several processes, which end with this one.

    The first that fails ends all.

    Args:
        console: Shows what is being done as long as the first process does not.

    Raises:
        LlmtuneError: What the first process reported that failed.
    """
    accelerator = resolve_accelerator(request.target.config.hardware.accelerator)
    with (
        restored_environment(),
        tempfile.TemporaryDirectory(prefix="llmtune-") as place,
    ):
        set_defaults(accelerator, world_size)
        file = Path(place) / "request.json"
        file.write_text(request.to_json())
        with (
            _started(["-m", "llmtune.predict.worker", str(file)], world_size) as group,
            Status(console, partial(describe_ranks, group)),
        ):
            codes: list[int | None] = [None] * world_size
            while None in codes and not any(codes):
                time.sleep(POLL_SECONDS)
                codes = [rank.exit_code() for rank in group.ranks]
            if any(codes):
                raise _to_error(group, codes, Path(place))


@contextmanager
def _started(command: list[str], world_size: int) -> Iterator[RankGroup]:
    group = RankGroup(command, world_size)
    try:
        yield group
    finally:
        group.close()


def _to_error(group: RankGroup, codes: list[int | None], logs: Path) -> LlmtuneError:
    reports = FailureReport.read_all(group.folder)
    if reports:
        first = reports[0]
        if first.known:
            return ERRORS_BY_CODE.get(first.code, LlmtuneError)(first.message)
        return LlmtuneError(f"process {first.rank}: {first.message}")
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    ending = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    log = logs / f"process-{rank}.log"
    lines = log.read_text(errors="replace").strip().splitlines()[-5:] if log.is_file() else []
    return LlmtuneError(
        "\n".join(
            [
                f"process {rank} ended with {ending} and left no message (has memory run out?)."
                " The same command goes on with the rows that are left",
                *lines,
            ]
        )
    )
