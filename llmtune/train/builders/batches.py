"""Build what makes the batches of a run: the collator, and the loader of training rows."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import LoaderSettings, Steps, TrainLoader
from llmtune.data.load.sequence_part import SequencePart
from llmtune.data.load.streaming import RowStream, StreamLoader
from llmtune.data.prepared_data import open_rows
from llmtune.engine.distributed import Rank
from llmtune.model.build import sees_padding
from llmtune.plan.length.batch_schedule import ScheduledBatch
from llmtune.storage import layout
from llmtune.task.task import find_task
from llmtune.train.request import RunRequest
from llmtune.varlen_attention import VARLEN


def build_collator(request: RunRequest, rank: Rank, model: Any, tokenizer: Any) -> Collator:
    """Build what makes batches of rows, with the targets of the task."""
    task, labels = find_task(request.config.model.task), request.labels
    kernel, shared = request.plan.attn_implementation, request.plan.batch.sequence_parallel_size
    # The noise of NEFTune depends on the length of a row. FlashAttention in transformers takes
    # several packed rows only joined.
    joins = kernel == VARLEN and request.config.train.neftune_noise_alpha is None
    return Collator(
        pad_token_id=tokenizer.pad_token_id,
        varlen=joins or kernel.startswith("flash"),
        flat=joins,
        part=SequencePart(rank.rank % shared, shared),
        masked=sees_padding(model),
        token_types="token_type_ids" in tokenizer.model_input_names and task.needs_labels,
        find_targets=partial(task.make_targets, labels=labels),
        find_weights=partial(task.row_weights, of=labels),
    )


def build_loader(request: RunRequest, rank: Rank, tokenizer: Any, collator: Collator) -> Steps:
    """Build the loader of training rows, from disk or tokenized during training."""
    config = request.config
    batch = ScheduledBatch.from_config(config.train, request.plan.batch)
    pinned = config.data.pin_memory
    settings = LoaderSettings(
        config.data.dataloader_num_workers,
        rank.device.type != "cpu" if isinstance(pinned, str) else pinned,
    )
    if config.data.streaming:
        bad_rows = request.run_folder / layout.BAD_ROWS if rank.is_first else None
        stream = RowStream(
            config=config.data,
            tokenizer=tokenizer,
            seed=config.seed,
            bad_rows=bad_rows,
            model_folder=request.model_folder,
        )
        return StreamLoader(
            stream=stream, batch=batch, rank=rank.rank, collator=collator, settings=settings
        )
    rows = open_rows(request.data, "train")
    return TrainLoader(
        rows=rows,
        batch=batch,
        rank=rank.rank,
        seed=config.seed,
        collator=collator,
        last_row=request.steps.total_rows,
        settings=settings,
    )
