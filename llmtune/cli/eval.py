"""``eval``: take the held-out loss and the metrics of a run, a checkpoint or a model."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from llmtune.cli.arguments import Options
from llmtune.config.composed import Composed
from llmtune.config.groups.data import name_data
from llmtune.config.schema import Config
from llmtune.security.terminal import to_json_line, to_terminal
from llmtune.track.console import Console
from llmtune.track.status import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from llmtune.data.load.batch import Batch
    from llmtune.data.load.collate import Collator
    from llmtune.run.target import Target
    from llmtune.task.labels import Labels
    from llmtune.task.task import Task

#: Most rows of a forward pass where none are asked for: there is no micro-batch to go by.
AUTO_EVAL_ROWS = 8
#: Bytes of a logit: 2, its copy in fp32, and what the loss makes of that.
LOGIT_BYTES = 10
#: Share of the memory that is free which the logits may take.
LOGITS_SHARE = 0.25


def auto_eval_rows(length: int, vocabulary: int, free_bytes: int) -> int:
    """Choose the rows of a forward pass so that their logits fit.

    The logits of 8 rows of 8,192 tokens of Llama 3 take 84 GB.

    Args:
        length: Tokens of the longest row.
        free_bytes: Memory that is left beside the weights.
    """
    row = LOGIT_BYTES * length * vocabulary
    return max(1, min(AUTO_EVAL_ROWS, int(LOGITS_SHARE * free_bytes / row)))


def describe_held_out(composed: Composed, config: Config) -> str:
    """Describe the rows that are scored.

    Args:
        config: With what is stored of a run, whose rows they are where the command line names none.
    """
    own = config.data.eval
    text = name_data(own) if own is not None else f"rows held out of {name_data(config.data.train)}"
    if "data" in composed.unnamed and config is composed.config:
        text += (
            " (questions about Python: no data is named; add data.eval=FILE or data.train=FILE for"
            " other rows)"
        )
    return text


def find_other_split(composed: Composed, target: Target, fingerprint: str) -> str | None:
    """Explain why the held-out rows may have been trained on.

    None where they are the rows that the run held out, or that the user named.

    Args:
        fingerprint: Of the rows as they are prepared now.
    """
    from llmtune.train.run_folder import RunFolder

    own = (
        composed.explicit("data")
        or composed.explicit("data.train")
        or target.config.data.eval is not None
    )
    if target.run is None or own:
        return None
    data = RunFolder(target.run).read_record().data
    if data is None or data.fingerprint in ("", fingerprint):
        return None
    return (
        "the rows are not those that the run held out, and it may have been trained on some of"
        " them: a file, the tokenizer, a setting, or the version of llmtune that draws them is"
        " another; name rows of your own with data.eval=FILE"
    )


def run(composed: Composed, options: Options) -> int:
    """Evaluate all held-out rows in this process."""
    with Status(Console(sys.stderr), "loading the libraries") as status:
        result = evaluate(composed, status)
    if options.as_json:
        sys.stdout.write(to_terminal(to_json_line(result) + "\n"))
    else:
        sys.stdout.write(
            to_terminal("".join(f"{key:<16} {value}\n" for key, value in result.items()))
        )
    return 0


def evaluate(composed: Composed, status: Status) -> dict[str, Any]:
    """Evaluate all held-out rows in this process.

    Returns:
        The loss per trained token or row, the metrics of the task, and whose rows they are.

    Raises:
        DataError: Nothing is held out, or a label is unknown to the model.
        CheckpointError: There is nothing complete at that place.
    """
    from llmtune.config.cache_folder import open_cache
    from llmtune.data.load.loader import iterate_eval
    from llmtune.data.prepared_data import open_rows
    from llmtune.data.report.label_checks import find_unknown_labels
    from llmtune.data.rows.problem_report import refuse
    from llmtune.data.store.vocabulary import check_stores
    from llmtune.errors import DataError
    from llmtune.plan.abilities import check_row_length, max_positions
    from llmtune.run.artifact import free_memory_bytes, load_model, resolve_target
    from llmtune.run.task import prepare_rows
    from llmtune.task.task import find_task

    status.doing = "loading the model"
    target = resolve_target(composed)
    config = target.config
    model, tokenizer = load_model(target)
    status.doing = "preparing the data"
    data = prepare_rows(config, tokenizer, open_cache(config.paths))
    check_stores((*data.train_stores, *data.eval_stores), target.model_folder, tokenizer)
    if data.eval is None:
        raise DataError("nothing is held out: add data.eval=FILE, or data.val_set_size above 0")
    task, labels = find_task(config.model.task), target.labels
    device = next(model.parameters()).device
    asked = config.train.per_device_eval_batch_size
    held_out = open_rows(data, "eval")
    if problems := list(find_unknown_labels(held_out, labels)):
        raise refuse(problems, "Correct the labels, or name other rows with data.eval=FILE")
    longest = int(held_out.lengths.max())
    check_row_length(longest, max_positions(model, model.config), target.base_name)
    outputs = 1 if task.judges_rows else len(labels.names) or len(tokenizer)
    rows = (
        asked
        if isinstance(asked, int)
        else auto_eval_rows(longest, outputs, free_memory_bytes(device))
    )
    collator = _make_collator(model, tokenizer, task, labels)
    batches = iterate_eval(held_out, rows, 0, 1, collator, None)
    status.doing = f"evaluating {data.eval.rows} rows"
    rounds = -(-data.eval.rows // rows)
    loss, weight, metrics = _judge(model, _told(batches, rounds, status), task, labels)
    note = find_other_split(composed, target, data.fingerprint)
    return {
        "eval_loss": loss,
        **metrics,
        "rows": data.eval.rows,
        **({"trained_tokens": int(weight)} if task.generates else {}),
        "data": describe_held_out(composed, config),
        "model": str(target.adapter or target.model_folder),
        **({"warning": note} if note else {}),
    }


def _make_collator(model: Any, tokenizer: Any, task: Task, labels: Labels) -> Collator:
    """Make what joins the held-out rows of a task to batches."""
    from llmtune.data.load.collate import Collator
    from llmtune.model.build import sees_padding

    return Collator(
        pad_token_id=tokenizer.pad_token_id,
        masked=sees_padding(model),
        token_types="token_type_ids" in tokenizer.model_input_names and task.needs_labels,
        find_targets=partial(task.make_targets, labels=labels),
    )


def _told(batches: Iterator[Batch], count: int, status: Status) -> Iterator[Batch]:
    """Yield the batches, and tell people how far the evaluation is."""
    for number, batch in enumerate(batches, start=1):
        status.how_far = partial("batch {} of {}".format, number, count)
        yield batch


def _judge(
    model: Any, batches: Iterable[Batch], task: Task, labels: Labels
) -> tuple[float, float, dict[str, float]]:
    """Return the mean loss of batches, the weight of their targets, and their metrics."""
    import torch

    from llmtune.task.objective import Objective

    device = next(model.parameters()).device
    objective = Objective.of_model(model, task, labels)
    objective.install()
    total, weight = 0.0, 0.0
    observed: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for batch in (batch.to(device) for batch in batches):
            run = partial(model, **batch.inputs, use_cache=False)
            loss, found = objective.judge(run, batch.targets)
            total += float(loss)
            weight += batch.targets.weight
            observed.append(found)
    joined = {name: torch.cat([one[name] for one in observed]).cpu() for name in observed[0]}
    return total / weight, weight, task.metrics(total / weight, joined, labels)
