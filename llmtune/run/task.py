"""Find out what the model is trained to do, and the classes or numbers that it must tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.best_model import can_choose
from llmtune.config.composed import Composed
from llmtune.config.groups.data import name_data
from llmtune.config.schema import Config
from llmtune.data.label_kind import peek_label_kind
from llmtune.errors import ConfigError
from llmtune.model.task_folder import order_names
from llmtune.plan.prepared_data import PreparedData
from llmtune.storage.plain_json import parse_json
from llmtune.task.labels import LabelKind, Labels
from llmtune.task.task import AUTO, TASKS, Task, find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.data.tokenized_source import ProgressCallback


def adopt_task(composed: Composed) -> Composed:
    """Take the task from the labels of the first rows, where ``model.task`` is ``auto``.

    Rows without labels leave it so, which stands for language modeling. The metric that chooses the
    best model, and whether the best is published, are the task's where nothing else is said.

    Raises:
        ConfigError: No task has the name.
    """
    config = composed.config
    task = find_task(config.model.task)
    if config.model.task == AUTO:
        kind = peek_label_kind(config.data)
        if kind is None:
            return composed
        task = next(task for task in TASKS.list().values() if kind in task.label_kinds)
        config = replace(config, model=replace(config.model, task=task.name))
    if task.keeps_best and can_choose(config):
        config = _adopt_best(config, task)
    return replace(composed, config=config)


def _adopt_best(config: Config, task: Task) -> Config:
    train, checkpoint = config.train, config.checkpoint
    if train.load_best_model_at_end == AUTO:
        train = replace(train, load_best_model_at_end=True)
    if checkpoint.metric_for_best_model is None:
        checkpoint = replace(checkpoint, metric_for_best_model=task.metric)
        if checkpoint.greater_is_better == AUTO:
            checkpoint = replace(checkpoint, greater_is_better=task.greater_is_better)
    return replace(config, train=train, checkpoint=checkpoint)


def prepare_rows(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    watch: ProgressCallback | None = None,
    strict: bool = True,
) -> PreparedData:
    """Prepare the rows with their labels as the task reads them; see :func:`prepare_data`."""
    # A plan asks this module for the task alone.
    from llmtune.data.prepare import prepare_data

    return prepare_data(
        config.data,
        tokenizer,
        config.seed,
        cache,
        watch,
        strict=strict,
        learns_numbers=find_task(config.model.task).learns_numbers,
    )


def resolve_labels(config: Config, data: PreparedData, model_folder: Path) -> Labels:
    """Number the classes of the rows; no labels for language modeling.

    They are numbered as the model has them, if it knows the same ones, and in order otherwise.

    Raises:
        ConfigError: The rows are not those of ``model.task``, or ``data.class_weights`` does not
            fit the classes, of which there may be none.
    """
    task = find_task(config.model.task)
    kind = LabelKind(data.label_kind) if data.label_kind else None
    if kind not in task.label_kinds:
        raise _wrong_labels(task, kind, config)
    has_classes = kind is not None and kind is not LabelKind.value
    if config.data.class_weights not in (None, "none") and not has_classes:
        raise ConfigError(
            f"data.class_weights={json.dumps(config.data.class_weights)}: the rows of"
            f" data.train={name_data(config.data.train)} have no classes; take"
            " data.class_weights=none"
        )
    if config.train.label_smoothing and kind not in task.smoothed_kinds:
        what = "with several classes per row" if kind is LabelKind.names else "of numbers"
        raise ConfigError(
            f"train.label_smoothing={config.train.label_smoothing}: the loss of {task.title}"
            f" {what} has no target to smooth; take train.label_smoothing=0"
        )
    if kind is None:
        return Labels()
    if kind is LabelKind.value:
        count = max(data.outputs, 1)
        names = ("value",) if count == 1 else tuple(f"value_{index}" for index in range(count))
        return Labels(kind=kind, names=names)
    stored: dict[str, Any] = parse_json((model_folder / "config.json").read_text())
    names = order_names(stored, tuple(map(str, data.classes)))
    return Labels(kind=kind, names=names, weights=_resolve_weights(config, data, kind, names))


def _wrong_labels(task: Task, kind: LabelKind | None, config: Config) -> ConfigError:
    described = {
        None: "no labels",
        LabelKind.name: "classes as labels",
        LabelKind.names: "lists of classes as labels",
        LabelKind.value: "real numbers as labels",
        LabelKind.tags: "a tag for every word",
    }[kind]
    fitting = [one.name for one in TASKS.list().values() if kind in one.label_kinds]
    return ConfigError(
        f"model.task={task.name}: the rows of data.train={name_data(config.data.train)} have"
        f" {described}; take model.task={' or '.join(fitting)}, or other rows"
    )


def _resolve_weights(
    config: Config, data: PreparedData, kind: LabelKind, names: tuple[str, ...]
) -> tuple[float, ...]:
    """Return the weight of each class in the loss; empty where all weigh the same.

    Raises:
        ConfigError: ``data.class_weights`` is none of its values, or has another length.
    """
    wanted = config.data.class_weights
    if wanted is None or wanted == "none":
        return ()
    if wanted == "balanced":
        counts = dict(zip(map(str, data.classes), data.class_counts, strict=True))
        if kind is LabelKind.names:
            # The weight of the rows that have a class, against those that have it not.
            return tuple((data.train.rows - counts[name]) / counts[name] or 1.0 for name in names)
        total = sum(counts.values())
        return tuple(total / (len(names) * counts[name]) for name in names)
    is_list = isinstance(wanted, list) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in wanted
    )
    if not is_list or len(wanted) != len(names):
        raise ConfigError(
            f"data.class_weights={json.dumps(wanted)}: take none, balanced, or a list of"
            f" {len(names)} numbers above 0, for {', '.join(names[:8])}"
        )
    return tuple(map(float, wanted))
