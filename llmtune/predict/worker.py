"""One process of several of a prediction: ``python -m llmtune.predict.worker REQUEST``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from llmtune.launch.launchers.environment import FAILURE_DIR
from llmtune.launch.processes.parent_death import die_with_supervisor
from llmtune.launch.supervise.rank_report import redirect_output, report_failure
from llmtune.storage.rank_files import heard_file
from llmtune.track.console import Console
from llmtune.track.status import HANDED_OVER_SECONDS, Status


def main(request_file: str) -> NoReturn:
    """Predict this process's share, and report an error to the command that started it."""
    die_with_supervisor()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _take_gpu(rank)
    # They import torch.
    from llmtune.predict.request import PredictRequest
    from llmtune.predict.share import predict_share

    request = PredictRequest.from_json(Path(request_file).read_text())
    # The first process shows the progress of all; standard output belongs to the rows.
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    output = redirect_output(Path(request_file).with_name(f"process-{rank}.log"))
    code = 0
    try:
        console = Console(terminal if rank == 0 else None)
        console.said_at = time.monotonic() - HANDED_OVER_SECONDS
        with Status(console, "predicting"):
            if rank == 0:
                heard_file(Path(os.environ[FAILURE_DIR])).touch()
            predict_share(request, rank, world_size, console)
    except BaseException as error:
        code = report_failure(error, rank, output, request.target.config.trace)
    terminal.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the clean-up of libraries, which takes a second.
    os._exit(code)


def _take_gpu(rank: int) -> None:
    """Let torch, which is not imported yet, see the GPU of this process alone."""
    if os.environ.get("DS_ACCELERATOR") == "cuda":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = listed.split(",") if listed else []
        os.environ["CUDA_VISIBLE_DEVICES"] = names[rank % len(names)] if names else str(rank)


if __name__ == "__main__":
    main(sys.argv[1])
