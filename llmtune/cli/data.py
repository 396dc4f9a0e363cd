"""``data``: check the data, and show what the model will see: tokens, masks, lengths, packing."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmtune.cli.arguments import Options
from llmtune.cli.output import Output, stdout_for_us
from llmtune.config.cache_folder import open_cache
from llmtune.config.composed import Composed
from llmtune.config.groups.data import DataConfig, name_data
from llmtune.config.schema import Config
from llmtune.data.formats.format import FORMATS
from llmtune.data.prepared_data import open_rows, read_problems
from llmtune.data.report.html import DataReport, write_page, write_picture
from llmtune.data.report.statistics import (
    Lengths,
    Padding,
    TextSpan,
    measure_lengths,
    measure_padding,
    redact_texts,
    show_row,
)
from llmtune.data.rows.fields import describe_unknown_fields
from llmtune.data.rows.problem_report import describe
from llmtune.data.rows.problems import Problem, format_location
from llmtune.data.store.token_store import Rows
from llmtune.data.store.vocabulary import check_padding, find_beyond
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.errors import DataError
from llmtune.model.token_folder import resolve_base_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.untrained_tokens import find_untrained_tokens
from llmtune.plan.batch_sizes import Ranks, resolve_batch
from llmtune.plan.prepared_data import PreparedData
from llmtune.run.attempt import resolve_run_target
from llmtune.security.terminal import GRAY, GREEN, color, show_controls, to_json_line
from llmtune.track.console import Console
from llmtune.track.status import Status
from llmtune.units import counted

#: Rows that are printed.
SHOWN_ROWS = 3

#: Classes whose counts are shown.
SHOWN_CLASSES = 10

#: Characters of a row on the terminal; the page shows all.
SHOWN_CHARACTERS = 1500

#: Rows of a forward pass where none are asked for, to show what padding costs.
AUTO_MICRO_BATCH = 4

#: Columns of the terminal's histogram.
BAR_WIDTH = 40


def run(composed: Composed, options: Options) -> int:
    """Prepare the data and report on it; the exit code is 4 if training would be refused."""
    # Asked first: below, standard output is redirected.
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    console = Console(sys.stderr)
    with Status(console, "preparing the data"), stdout_for_us() as write:
        try:
            return _report(composed, options, write, colors, console)
        except DataError as error:
            # Nothing to count: a program that reads the report still gets one.
            if options.as_json:
                problem = {"file": None, "line": None, "message": str(error)}
                write(
                    to_json_line({"rows": 0, "problems": [problem], "refused": True}, letters=True)
                    + "\n"
                )
            raise


def _report(
    composed: Composed, options: Options, write: Output, colors: bool, console: Console
) -> int:
    from llmtune.run.prepare import watch_tokenizing
    from llmtune.run.task import adopt_task, prepare_rows, resolve_labels

    composed = adopt_task(composed)
    config = composed.config
    if config.data.streaming:
        raise DataError(
            "data.streaming=true: a stream cannot be counted; look at some files of it with"
            " data.streaming=false"
        )

    # The rows as a training would read them, except that problems are collected.
    cache = open_cache(config.paths)
    folder = resolve_base_folder(config.model, config.tuner.new_tokens, cache, console.say)
    tokenizer = load_tokenizer(folder, config.model, load_chat_template(config.data.chat_template))
    data = prepare_rows(config, tokenizer, cache, watch_tokenizing(console), strict=False)
    if not data.fatal:
        resolve_labels(config, data, folder)
    check_padding(folder, tokenizer)
    beyond = list(find_beyond((*data.train_stores, *data.eval_stores), folder, tokenizer))
    data = replace(data, fatal=data.fatal + len(beyond))
    problems = [*beyond, *read_problems(data)]
    rows = open_rows(data, "train")

    # What the terminal, the page and ``--json`` show.
    report = _build_report(config, data, rows, problems, tokenizer)
    report.numbers["read as"] = _describe_format(config.data, data.formats)
    report.numbers["read by"] = _describe_reader(composed)
    untrained = _untrained(folder, data, tokenizer)
    if options.as_json:
        named = {
            "data": config.data.train,
            "model": config.model.name_or_path,
            "read_by": report.numbers["read by"],
        }
        write(to_json_line(named | to_json(data, report, untrained), letters=True) + "\n")
    else:
        for text in to_text(report, untrained):
            write(text + "\n")
        _write_files(
            report,
            Path(config.output_dir or f"{resolve_run_target(composed).folder}-data").expanduser(),
            colors,
            write,
        )
    if data.fatal:
        sys.stderr.write(
            f"error: training on this data is refused: {counted(data.fatal, 'problem')}\n"
        )
    return DataError.exit_code if data.fatal else 0


def _describe_reader(composed: Composed) -> str:
    """Name the model whose tokenizer was used."""
    name = composed.config.model.name_or_path
    if "model" in composed.unnamed:
        return (
            f"{name}, the default model, because none is named: add model= or model.name_or_path="
            " for another's tokens"
        )
    return name


def _describe_format(config: DataConfig, formats: list[str]) -> str:
    """Name the rows' format, and the chat template that makes a text of them."""
    found = ", ".join(formats)
    if not any(FORMATS.find(name).is_chat for name in formats):
        return f"{found}, without a chat template"
    template = (
        f"data.chat_template={config.chat_template}"
        if config.chat_template
        else "the tokenizer's own"
    )
    return f"{found}; chat template: {template}"


def _build_report(
    config: Config, data: PreparedData, rows: Rows, problems: list[Problem], tokenizer: Any
) -> DataReport:
    asked, global_batch = config.train.per_device_train_batch_size, config.train.global_batch_size
    if not isinstance(global_batch, int):
        shared = config.launch.sequence_parallel_size
        # More ranks than these may be started; they are a multiple of a group.
        ranks = Ranks(max(config.launch.nproc or 1, shared), shared)
        global_batch = resolve_batch(config.train, ranks).global_batch_size
    lengths = measure_lengths(rows)
    padding = measure_padding(
        rows,
        config.data.max_seq_length,
        asked if isinstance(asked, int) else min(AUTO_MICRO_BATCH, global_batch),
        global_batch,
        config.seed,
        data.train.packing_efficiency,
    )
    step = max(1, len(rows) // SHOWN_ROWS)
    shown = [
        (
            format_location(*rows.location(rows.first_document(number))),
            redact_texts(show_row(rows, number, tokenizer)),
        )
        for number in range(0, len(rows), step)[:SHOWN_ROWS]
    ]
    return DataReport(
        title=f"Data: {name_data(config.data.train)}",
        numbers=_numbers(config, data, lengths, padding),
        lengths=lengths,
        padding=padding,
        problems=problems,
        rows=shown,
    )


def _numbers(
    config: Config, data: PreparedData, lengths: Lengths, padding: Padding
) -> dict[str, str]:
    train, held_out = data.train, data.eval
    share = train.supervised_tokens / max(1, train.tokens)
    supervised = f"{counted(train.supervised_tokens, 'token')} ({share:.1%})"
    if data.label_kind is not None:
        supervised = counted(train.supervised_tokens, "label")
    numbers = {
        "rows": (
            f"{train.documents:,}"
            + (f" in {train.rows:,} packed rows" if config.data.packing else "")
        ),
        "held out": (
            f"{counted(held_out.rows, 'row')}, {counted(held_out.tokens, 'token')}"
            if held_out
            else "none"
        ),
        "tokens": f"{train.tokens:,}",
        "supervised": supervised,
        "dropped": (
            f"{train.dropped:,} longer than data.max_seq_length={config.data.max_seq_length}"
        ),
        "truncated": f"{train.truncated:,}",
        "skipped": f"{train.skipped:,} that cannot be trained on",
        "twins": f"{train.duplicates_of_eval:,} that equal a held-out row, left out of training",
        "lengths": (
            f"mean {lengths.mean:.0f}, median {lengths.p50}, 95 % {lengths.p95}, 99 %"
            f" {lengths.p99}, longest {lengths.longest}"
        ),
        "padding": (
            f"{padding.to_max_length:.1%} if every row had {config.data.max_seq_length} tokens,"
            f" {padding.random:.1%} in random batches, {padding.grouped:.1%} grouped by length"
            + (f", {padding.packed:.2%} packed" if padding.packed is not None else "")
        ),
    }
    if train.packing_efficiency is not None:
        numbers["packing"] = (
            f"rows of {config.data.max_seq_length} filled to {train.packing_efficiency:.2%}"
        )
    if data.unknown_fields:
        numbers["not read"] = describe_unknown_fields(data.unknown_fields)
    if data.label_kind is not None:
        numbers["labels"] = _describe_labels(data)
    return numbers


def _describe_labels(data: PreparedData) -> str:
    """Describe the classes with their counts in the training rows, the largest first."""
    if not data.classes:
        return f"{counted(data.outputs, 'number')} per row"
    counts = sorted(zip(data.classes, data.class_counts, strict=True), key=lambda entry: -entry[1])
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts[:SHOWN_CLASSES])
    more = f" and {len(counts) - SHOWN_CLASSES} more" if len(counts) > SHOWN_CLASSES else ""
    noun = "class" if len(counts) == 1 else "classes"
    return f"{len(counts):,} {noun}: {shown}{more}"


def to_json(data: PreparedData, report: DataReport, untrained: list[str]) -> dict[str, Any]:
    """Return the counts as plain values.

    ``rows`` counts documents, and ``packed_rows`` the rows that the model sees.
    """
    train = data.train
    return {
        "rows": train.documents,
        "packed_rows": train.rows if train.packing_efficiency is not None else None,
        "tokens": train.tokens,
        "supervised_tokens": train.supervised_tokens,
        "dropped": train.dropped,
        "truncated": train.truncated,
        "skipped": train.skipped,
        "twins": train.duplicates_of_eval,
        "packing_efficiency": train.packing_efficiency,
        "padding": asdict(report.padding) if report.padding else None,
        "problems": [asdict(problem) for problem in report.problems],
        "refused": data.fatal > 0,
        "formats": data.formats,
        "unknown_fields": data.unknown_fields,
        "untrained_tokens": untrained,
        "lengths": report.lengths.to_dict() if report.lengths else None,
        "labels": data.classes,
        "label_counts": data.class_counts,
        "eval": {"rows": data.eval.rows, "tokens": data.eval.tokens} if data.eval else None,
        "fingerprint": data.fingerprint,
    }


def to_text(report: DataReport, untrained: list[str]) -> list[str]:
    """Return the lines of the report on a terminal, without its rows."""

    width = max(map(len, report.numbers))
    lines = [
        report.title,
        *(f"  {name:<{width}}  {value}" for name, value in report.numbers.items()),
    ]
    if untrained:
        lines.append(
            "  warning: these tokens occur, and the model never trained their embeddings:"
            f" {', '.join(untrained)}"
        )
    if report.lengths:
        lines += ["", *_histogram(report.lengths)]
    if report.problems:
        lines += ["", "problems", *(f"  {line}" for line in describe(report.problems))]
    return lines


def _histogram(lengths: Lengths) -> list[str]:
    highest = max(lengths.rows)
    lines = [f"{'tokens':>13}  {'documents':>10}  {'trained tokens':>14}"]
    for number, (count, trained) in enumerate(zip(lengths.rows, lengths.trained, strict=True)):
        name = f"{lengths.edges[number]}-{lengths.edges[number + 1] - 1}"
        lines.append(
            f"{name:>13}  {count:>10,}  {trained:>14,}  {'#' * round(count / highest * BAR_WIDTH)}"
        )
    return lines


def _write_files(report: DataReport, folder: Path, colors: bool, write: Any) -> None:
    """Print rows in two colors, and write the picture and the page."""
    for where, spans in report.rows:
        write(f"\n{where}\n")
        write.in_color(_colored(spans, colors) + "\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / "lengths.png"
        if report.lengths:
            write_picture(report.lengths, report.title, picture)
        write_page(report, picture if report.lengths else None, folder / "data.html")
    except OSError as error:
        raise DataError(
            f"output_dir={folder}: {error.strerror}; take another output_dir="
        ) from error
    write(f"\npicture {picture}\npage    {folder / 'data.html'}\n")


def _colored(spans: list[TextSpan], colors: bool) -> str:
    """Color trained text green and masked text gray; without colors, bracket trained text."""
    parts = []
    left = SHOWN_CHARACTERS
    for span in spans:
        text = span.text if len(span.text) <= left else span.text[:left] + " ..."
        left -= len(text)
        if colors:
            parts.append(color(text, GREEN if span.trained else GRAY))
        else:
            parts.append(f"[[{show_controls(text)}]]" if span.trained else show_controls(text))
        if left <= 0:
            break
    return "".join(parts)


def _untrained(folder: Path, data: PreparedData, tokenizer: Any) -> list[str]:
    return [
        str(token)
        for token in tokenizer.convert_ids_to_tokens(
            find_untrained_tokens(folder, data.special_tokens)
        )
    ]
