"""``llmtune.load_run``: a run folder, with what was planned, measured and trained."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.api.overrides import Override, compose_verb

if TYPE_CHECKING:
    from llmtune.config.composed import Composed
    from llmtune.config.schema import Config
    from llmtune.plan.run_record import RunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder as it was when :func:`load_run` read it."""

    folder: Path
    name: str
    state: str
    """``running``, ``finished``, ``stopped`` or ``failed``."""
    step: int
    """The last optimizer step that has a line in ``metrics.jsonl``; 0 where none has."""
    config: Config = field(repr=False)
    """The composed configuration, without secrets."""
    record: RunRecord = field(repr=False)
    """``plan.json``: everything that was derived for the run."""
    metrics: list[dict[str, Any]] = field(repr=False)
    """The records of ``metrics.jsonl``, which ``pandas.DataFrame`` takes as they are.

    Those with ``loss`` are of a training step, those with ``eval_loss`` of an evaluation.
    """
    checkpoints: dict[int, Path] = field(repr=False)
    """Step -> the folder of a complete checkpoint, in order."""
    adapter: Path | None
    """The trained adapter; None where the tuner makes none, and before the run is finished."""
    model: Path | None
    """The folder that ``transformers`` loads: the merged model, or what was trained in full."""

    def load_model(self, *overrides: Override) -> tuple[Any, Any]:
        """Load what was trained into this process, an adapter on its base.

        Of a run that was never finished it is the newest checkpoint; of one that goes on, what its
        earlier end published.

        Args:
            overrides: On top of the run's configuration, such as ``"precision=fp32"``.

        Returns:
            The model of transformers, in evaluation mode, and its tokenizer.

        Raises:
            CheckpointError: There is nothing complete yet, or it is damaged.
        """
        from llmtune.cli.output import quieted_libraries
        from llmtune.run.artifact import load_model, resolve_target

        with quieted_libraries():
            return load_model(resolve_target(self._compose("chat", overrides)))

    def evaluate(self, *overrides: Override) -> dict[str, Any]:
        """Take the held-out loss and the metrics, as the verb ``eval``.

        Args:
            overrides: Such as ``"data.eval=other.jsonl"``.

        Raises:
            DataError: Nothing is held out.
            CheckpointError: There is nothing complete yet, or it is damaged.
        """
        from llmtune.cli.eval import evaluate
        from llmtune.cli.output import quieted_libraries
        from llmtune.track.console import Console
        from llmtune.track.status import Status

        with (
            quieted_libraries(),
            Status(Console(sys.stderr), "loading the libraries") as status,
        ):
            return evaluate(self._compose("eval", overrides), status)

    def export(self, *overrides: Override) -> Path:
        """Export what was trained, as the verb ``export``.

        Args:
            overrides: Such as ``"export=gguf"``, or ``{"output_dir": folder}``.

        Returns:
            The folder that was written.

        Raises:
            ExportError: The export would be wrong, or a package for it is missing.
        """
        from llmtune.cli.export import export
        from llmtune.cli.output import quieted_libraries
        from llmtune.track.console import Console

        console = Console(sys.stderr)
        with quieted_libraries():
            return export(self._compose("export", overrides), console.say, console)

    def _compose(self, verb: str, overrides: tuple[Override, ...]) -> Composed:
        return compose_verb(verb, ({"target.run": self.folder}, *overrides), None)


def load_run(folder: str | Path) -> Run:
    """Read a run folder, of a run that has ended or goes on.

    Args:
        folder: Such as ``runs/NAME``.

    Raises:
        CheckpointError: It is no run folder, or may not be read.
        ConfigError: Its configuration has keys that this version does not know.
    """
    from llmtune.config.stored import load_config
    from llmtune.errors import CheckpointError
    from llmtune.report.run_facts import read_run
    from llmtune.storage import layout
    from llmtune.storage.manifest import is_complete
    from llmtune.track.metrics import read_metrics

    path = Path(folder).expanduser().absolute()
    if not (path / layout.CONFIG).is_file():
        raise CheckpointError(
            f"{path}: no run folder (it has no {layout.CONFIG}); name a folder such as runs/NAME"
        )
    facts = read_run(path)
    # Not where the file is a link or a pipe, of which the facts have nothing.
    metrics = read_metrics(path / layout.METRICS) if facts.metrics.by_key else []
    adapter, model, merged = (path / name for name in (layout.ADAPTER, layout.MODEL, layout.MERGED))
    loadable = [place for place in (merged, model) if is_complete(place)]
    return Run(
        folder=path,
        name=facts.name,
        state=facts.state,
        step=facts.metrics.last_step or 0,
        config=load_config(path / layout.CONFIG),
        record=facts.record,
        metrics=metrics,
        checkpoints={step: layout.checkpoint_folder(path, step) for step in facts.checkpoints},
        # Of a run that goes on, they are those of its earlier end.
        adapter=adapter if facts.finished and is_complete(adapter) else None,
        model=loadable[0] if facts.finished and loadable else None,
    )
