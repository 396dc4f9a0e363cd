"""A prediction from the command line to its output: resolve, prepare, predict, join.

Everything is kept in a folder beside the output (:mod:`llmtune.predict.folder`) until the output is
whole. The same command goes on with what it finds there; another one is refused.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmtune.config.cache_folder import open_cache
from llmtune.config.composed import Composed
from llmtune.config.stored import to_plain
from llmtune.data.prompt_rows import find_files, parse_input, read_prompts
from llmtune.data.read.fingerprint import hash_files, hash_tokenizer
from llmtune.errors import CheckpointError, ConfigError, LlmtuneError
from llmtune.model.weights.files import identify_weights
from llmtune.predict.folder import JobFolder, Prepared
from llmtune.predict.output_row import make_output_row, write_line
from llmtune.predict.processes import count_processes, run_processes
from llmtune.predict.request import PredictRequest
from llmtune.predict.share import predict_share, window_size
from llmtune.run.artifact import load_target_tokenizer, resolve_target
from llmtune.run.target import Target
from llmtune.storage import layout
from llmtune.storage.atomic import open_atomically, read_json, remove_folder, write_cache_file
from llmtune.storage.hashing import hash_json
from llmtune.storage.lock import hold_lock
from llmtune.task.task import find_task
from llmtune.track.console import Console
from llmtune.track.status import Status

if TYPE_CHECKING:
    from llmtune.data.read.sources import DataFile, Source

#: Part of the identity of a job; raise it when rows are prepared or predicted differently.
PREDICT_VERSION = 1

#: End of the name of the folder beside the output.
PARTS = ".parts"

#: Values of ``predict.output`` that mean standard output.
PRINTED = (None, "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A prediction whose model and input are known."""

    target: Target
    tokenizer: Any
    sources: list[Source]
    files: list[list[DataFile]]
    identity: str
    """Hash of all that the output depends on."""


def run_prediction(composed: Composed, console: Console, printed: BinaryIO) -> dict[str, Any]:
    """Predict all rows, or the rest of them, and return a summary.

    Args:
        console: Shows what is being done.
        printed: Gets the rows where ``predict.output`` names no file.

    Raises:
        ConfigError: No input is named, or the output exists and is not this job's.
        CheckpointError: The folder beside the output is another job's, or in use.
        DataError: Rows cannot be predicted, with ``file:line``.
    """
    started = time.monotonic()
    settings = composed.config.predict
    if settings.input is None:
        raise ConfigError("predict needs rows: add predict.input=FILE")
    sources = parse_input(settings.input)
    files = find_files(sources)
    output = None if settings.output in PRINTED else Path(str(settings.output)).expanduser()
    with ExitStack() as stack:
        with Status(console, "preparing the rows"):
            job = _resolve(composed, sources, files)
            if output is not None and (summary := _find_finished(output, job)) is not None:
                return {**summary, "predicted": 0, **_measure(0, started)}
            folder = stack.enter_context(_open_folder(output, job))
            prepared = folder.prepared or _prepare(job, folder)
        done_before = _count_rows_done(folder, prepared, job)
        _predict(job, folder, prepared, console)
        summary = _summarize(job, prepared, settings.output)
        with Status(console, "writing the output"):
            if output is None:
                _join(folder, prepared, job, printed)
            else:
                with open_atomically(output) as file:
                    _join(folder, prepared, job, file)
                _note_finished(output, job, summary)
                remove_folder(folder.path)
    predicted = prepared.rows - done_before
    return {**summary, "predicted": predicted, **_measure(predicted, started)}


def _measure(rows: int, started: float) -> dict[str, float]:
    seconds = time.monotonic() - started
    return {"seconds": round(seconds, 3), "rows_per_second": round(rows / seconds, 3)}


def _resolve(composed: Composed, sources: list[Source], files: list[list[DataFile]]) -> _Job:
    target = resolve_target(composed)
    # What a stored configuration says of predictions is of no account.
    config = replace(target.config, predict=composed.config.predict)
    target = replace(target, config=config)
    tokenizer = load_target_tokenizer(target)
    cache = open_cache(config.paths)
    contents = [
        [hash_files(of_source, source, cache), source.format, source.fields, source.split]
        for source, of_source in zip(sources, files, strict=True)
    ]
    settings = to_plain(config.predict)
    for place in ("input", "output"):
        del settings[place]
    data = config.data
    shaping = [data.max_seq_length, data.overlong.value, data.on_bad_row.value]
    shaping.append(data.allow_special_tokens)
    weights = [identify_weights(target.model_folder), _identify_adapter(target.adapter)]
    what = [target.config.model.task, target.labels.to_dict(), config.precision.value]
    identity = [PREDICT_VERSION, contents, settings, shaping, hash_tokenizer(tokenizer)]
    return _Job(
        target=target,
        tokenizer=tokenizer,
        sources=sources,
        files=files,
        identity=hash_json([*identity, weights, what]),
    )


def _identify_adapter(adapter: Path | None) -> list[Any]:
    if adapter is None:
        return []
    files = [adapter / layout.ADAPTER_CONFIG, *sorted(adapter.glob("*.safetensors"))]
    return [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()
    ]


def _find_finished(output: Path, job: _Job) -> dict[str, Any] | None:
    """The summary of a job that wrote its output earlier; None where there is something to do.

    Raises:
        ConfigError: The output is not this job's.
    """
    folder = _parts_folder(output)
    if not output.exists() and not output.is_symlink():
        return None
    record = read_json(_finished_file(output, job)) or {}
    if record.get("job") == job.identity and record.get("size") == output.stat().st_size:
        remove_folder(folder)
        summary: dict[str, Any] = record["summary"]
        return summary
    if JobFolder(folder).job == job.identity:
        # Killed before it had removed its folder.
        return None
    raise ConfigError(
        f"predict.output={output} exists, and is not the output of this command; remove it, or name"
        " another file"
    )


def _finished_file(output: Path, job: _Job) -> Path:
    place = hash_json(str(output.resolve()))
    return open_cache(job.target.config.paths) / "predict" / f"{place}.json"


def _note_finished(output: Path, job: _Job, summary: dict[str, Any]) -> None:
    """Remember whose output it is, for the same command when it is given again."""
    record = {"job": job.identity, "size": output.stat().st_size, "summary": summary}
    write_cache_file(_finished_file(output, job), json.dumps(record))


def _parts_folder(output: Path) -> Path:
    return output.with_name(output.name + PARTS)


@contextmanager
def _open_folder(output: Path | None, job: _Job) -> Iterator[JobFolder]:
    """The folder beside the output, held against other commands; without one, a passing folder.

    Raises:
        CheckpointError: It is another job's, or in use.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="llmtune-") as place:
            yield JobFolder(Path(place))
        return
    path = _parts_folder(output)
    folder = JobFolder(path)
    if path.exists() and folder.job is None and not _is_unused(path):
        raise CheckpointError(
            f"{path} is needed for the results on their way, and is something else; remove it, or"
            " take another predict.output="
        )
    path.mkdir(parents=True, exist_ok=True)
    with hold_lock(path / layout.LOCK, "predict.output="):
        # Of another one that was ended before it had predicted anything, nothing is lost.
        if folder.job not in (None, job.identity) and folder.prepared is not None:
            raise CheckpointError(
                f"{path} holds the results of another prediction: other rows, another model or"
                " other settings. Give its command again to end it; or remove the folder, or take"
                " another predict.output="
            )
        folder.begin(job.identity)
        yield folder


def _is_unused(path: Path) -> bool:
    """Tell whether a folder holds only what a command left that was killed at its beginning."""
    return path.is_dir() and all(
        file.name == layout.LOCK or file.name.startswith(".job.json") for file in path.iterdir()
    )


def _prepare(job: _Job, folder: JobFolder) -> Prepared:
    from llmtune.predict.prepare import RowEncoder, prepare_windows

    rows = read_prompts(job.sources, job.files, job.target.labels.kind)
    try:
        return prepare_windows(rows, RowEncoder.of(job.target, job.tokenizer), folder)
    except LlmtuneError:
        # Refused: nothing of it is needed again.
        remove_folder(folder.path)
        raise


def _predict(job: _Job, folder: JobFolder, prepared: Prepared, console: Console) -> None:
    request = PredictRequest(target=job.target, folder=folder.path)
    count = count_processes(job.target, prepared.windows)
    if count == 1:
        predict_share(request, 0, 1, console)
    elif not all(map(folder.has_results, range(prepared.windows))):
        run_processes(request, count, console)


def _join(folder: JobFolder, prepared: Prepared, job: _Job, output: BinaryIO) -> None:
    """Write all rows, in order."""
    key = "text" if find_task(job.target.config.model.task).generates else "prediction"
    number = 0
    for window in range(prepared.windows):
        for fields, error, result in folder.read_rows(window):
            row = make_output_row(fields, number, error, result, key)
            output.write(write_line(row).encode())
            number += 1


def _count_rows_done(folder: JobFolder, prepared: Prepared, job: _Job) -> int:
    """Rows of the windows that an earlier command predicted."""
    size = window_size(job.target)
    return sum(
        min(size, prepared.rows - window * size)
        for window in range(prepared.windows)
        if folder.has_results(window)
    )


def _summarize(job: _Job, prepared: Prepared, output: str | None) -> dict[str, Any]:
    target = job.target
    return {
        "output": output or "-",
        "model": str(target.adapter or target.model_folder),
        "task": target.config.model.task,
        "rows": prepared.rows,
        "not_predicted": prepared.skipped,
        "cut": prepared.truncated,
    }
