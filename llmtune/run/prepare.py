"""Prepare a run before its ranks start: once per command, and once more per attempt.

The supervisor does it, and rank 0 under a launcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.checkpoint.trainer_state import read_trainer_state
from llmtune.config.best_model import resolve_best_model
from llmtune.config.cache_folder import open_cache
from llmtune.config.composed import Composed
from llmtune.config.schema import Config
from llmtune.data.prepared_data import open_rows
from llmtune.data.rows.fields import describe_unknown_fields
from llmtune.data.store.vocabulary import check_stores, embedding_rows
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.data.tokenized_source import ProgressCallback, TokenizeProgress
from llmtune.errors import ConfigError
from llmtune.export.prerequisites import check_exportable
from llmtune.model.task_folder import resolve_task_folder
from llmtune.model.token_folder import find_token_ids, find_token_numbers, resolve_base_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.untrained_tokens import find_untrained_tokens
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.length.batch_schedule import ScheduledBatch
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.plan import Plan
from llmtune.plan.prepared_data import PreparedData
from llmtune.plan.steps import StepsPlan, evaluation_interval
from llmtune.run.attempt import RunInputs, RunTarget
from llmtune.run.check_model import check_model, check_quantized
from llmtune.run.task import prepare_rows, resolve_labels
from llmtune.storage.signature import read_signer
from llmtune.task.task import find_task
from llmtune.track.console import Console, bar
from llmtune.track.service import check_packages
from llmtune.train.mirror_owner import resolve_run_id
from llmtune.train.resume import resume_point
from llmtune.train.run_folder import RunFolder
from llmtune.train.schedule import check_schedule, describe_extension
from llmtune.tuner.token_rows.settings import INDICES, find_texts, with_numbers
from llmtune.units import counted, format_count


def prepare_run(
    composed: Composed, plan: Plan, target: RunTarget, folder: RunFolder, console: Console
) -> RunInputs:
    """Check the command, and prepare model files and data; nothing of it depends on the attempt.

    Args:
        plan: Of the first attempt. Those of others have the same batch and attention.

    Raises:
        LlmtuneError: Of every kind but export, before any rank has begun.
    """
    # First what is refused quickly. Rank 0 reads the signing key again when it has the model.
    read_signer(composed.config.checkpoint.sign)
    check_packages(composed.config.tracker)
    step_rows = plan.batch.global_batch_size
    config = replace(
        composed.config, train=replace(composed.config.train, global_batch_size=step_rows)
    )
    if changed := folder.find_changes(config):
        console.say(f"changed since the last start: {', '.join(changed)}")
    resume_from = resume_point(folder, config, target.name, console.say)
    run_id = resolve_run_id(folder, config, target.name, resume_from, console.say)

    # The model, and whether its export will be possible.
    cache = open_cache(config.paths)
    base = resolve_base_folder(config.model, config.tuner.new_tokens, cache, console.say)
    needs_head = find_task(config.model.task).needs_labels
    if not needs_head:
        _check_files(config, plan, base, cache, console)

    # The rows, and the head that their labels ask for.
    tokenizer = _load_tokenizer(config, base)
    data = prepare_rows(config, tokenizer, cache, watch_tokenizing(console))
    _check_data(config, data, tokenizer, base, console)
    labels = resolve_labels(config, data, base)
    model_folder = resolve_task_folder(
        base, config.model, labels, tokenizer, config.seed, cache, console.say
    )
    if needs_head:
        _check_head(config, plan, model_folder, tokenizer, cache, console)

    # The steps that the rows make.
    steps = _resolve_steps(config, data, plan.batch)
    check_evaluations(config, data, steps, console.say)
    check_schedule(config.schedule, steps, plan.learning_rate)
    if (shorter := folder.find_extension(steps, data.fingerprint)) is not None:
        done = read_trainer_state(resume_from).step if resume_from is not None else 0
        console.say(describe_extension(config.schedule, done, shorter, steps))
    return RunInputs(
        config=config,
        overrides=composed.overrides,
        target=target,
        folder=folder,
        run_id=run_id,
        model_folder=model_folder,
        data=data,
        labels=labels,
        steps=steps,
        resume_from=resume_from,
    )


def _resolve_steps(config: Config, data: PreparedData, batch: BatchPlan) -> StepsPlan:
    """Resolve the number of steps; a batch that grows with tokens needs the rows for it."""
    rows = None if config.data.streaming else data.train.rows
    scheduled = ScheduledBatch.from_config(config.train, batch)
    in_steps = None
    if rows is not None and scheduled.schedule.counts_tokens:
        # It imports torch, for which ranks that start cold would wait.
        from llmtune.data.load.count_steps import count_in_steps

        in_steps = count_in_steps(open_rows(data, "train"), scheduled, config.train, config.seed)
    return resolve_steps(config.train, config.schedule, rows, batch.global_batch_size, in_steps)


def watch_tokenizing(console: Console) -> ProgressCallback:
    """Make a callback that shows a progress line while sources are tokenized."""
    shown = 0.0

    def watch(progress: TokenizeProgress) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < console.interval_seconds or progress.seconds < 1:
            return
        shown = now
        share = "" if progress.share is None else f"{bar(progress.share)} {progress.share:4.0%}  "
        console.progress(
            f"tokenizing {progress.source}  {share}{format_count(progress.rows)} rows  "
            f"{format_count(int(progress.tokens / progress.seconds))} tokens/s"
        )

    return watch


def _check_head(
    config: Config, plan: Plan, folder: Path, tokenizer: Any, cache: Path, console: Console
) -> None:
    """Check a folder with a head, and say which token of a row a decoder is judged by."""
    _check_files(config, plan, folder, cache, console)
    if find_task(config.model.task).judges_rows and not plan.shape.bidirectional:
        console.say(
            f"rows are padded on the right with {tokenizer.pad_token}, and judged by their last"
            " token before it"
        )


def _check_files(config: Config, plan: Plan, folder: Path, cache: Path, console: Console) -> None:
    check_quantized(config, plan.placement.zero_stage, folder)
    check_model(config, plan.attn_implementation, folder, cache, console.say)
    check_exportable(config.export, folder)


def check_evaluations(
    config: Config, data: PreparedData, steps: StepsPlan, say: Callable[[str], None]
) -> None:
    """Check that there are evaluations to choose the best model by, and to stop early after.

    Raises:
        ConfigError: No row is held out, or no evaluation comes before the end.
    """
    best = resolve_best_model(config)
    if best is None:
        return
    if data.eval is None or data.eval.rows == 0:
        raise ConfigError(
            f"{best.metric} is to choose the best model, and no row is held out: add"
            " data.eval=FILE, or a larger data.val_set_size"
        )
    if best.patience is None:
        return
    # The first evaluation has nothing to improve on.
    possible = evaluation_interval(config.train, steps).count()
    patience = f"train.early_stopping_patience={best.patience}"
    if possible == 0:
        raise ConfigError(
            f"{patience}: no evaluation comes before the end of the"
            f" {counted(steps.total_steps, 'step')}; take a smaller train.eval_steps, or more steps"
        )
    if possible <= best.patience:
        say(
            f"warning: {patience} cannot stop this run early: it needs {best.patience + 1}"
            f" evaluations before the end, and there are {possible}"
        )


def _load_tokenizer(config: Config, base: Path) -> Any:
    """Load the tokenizer of the rows, which has every token that the config names."""
    template = load_chat_template(config.data.chat_template)
    tokenizer = load_tokenizer(base, config.model, template)
    check_token_rows(config, tokenizer, base)
    return tokenizer


def check_token_rows(config: Config, tokenizer: Any, base: Path) -> None:
    """Check the tokens whose rows are trained, which only the tokenizer knows.

    Raises:
        ConfigError: A text is not exactly one token, or a row is named twice or does not exist.
    """
    tuner, name = config.tuner, config.model.name_or_path
    texts = find_texts(tuner)
    numbers = find_token_numbers(tokenizer, texts, name)
    asked = with_numbers(tuner, numbers).trainable_token_indices or []
    lists = asked.values() if isinstance(asked, Mapping) else [asked]
    named = {number for tokens in lists for number in tokens}
    for text, number in zip(tuner.new_tokens, find_token_ids(base, tuner.new_tokens), strict=True):
        if number in named:
            raise ConfigError(
                f"{INDICES}: {text} of tuner.new_tokens is token {number}, whose row is trained"
                " already; leave it out"
            )
    rows = embedding_rows(base)
    for text, number in numbers.items():
        if rows is not None and number >= rows:
            raise ConfigError(
                f"{INDICES}: {text!r} is token {number} of the tokenizer of {name}, and the model"
                f" has {rows} rows"
            )


def _check_data(
    config: Config, data: PreparedData, tokenizer: Any, model_folder: Path, console: Console
) -> None:
    """Check that the prepared rows can be trained on.

    Raises:
        DataError: Rows of the stream's beginning cannot be trained on, or hold tokens that the
            model does not know.
    """
    unknown = set(data.unknown_fields)
    if config.data.streaming:
        from llmtune.data.load.streaming import RowStream

        unknown |= RowStream(
            config.data, tokenizer, config.seed, model_folder=model_folder
        ).find_unknown_fields()
    if unknown:
        console.say(f"fields of the rows that are not read: {describe_unknown_fields(unknown)}")
    check_stores((*data.train_stores, *data.eval_stores), model_folder, tokenizer)
    untrained = find_untrained_tokens(model_folder, data.special_tokens)
    if untrained:
        tokens = ", ".join(map(str, tokenizer.convert_ids_to_tokens(untrained)))
        console.say(
            f"warning: the rows hold {tokens}, whose embeddings {config.model.name_or_path} never"
            " trained; take the model's instruct version, or a data.chat_template with tokens that"
            " it knows"
        )
