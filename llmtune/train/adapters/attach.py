"""Attach what is trained to a rank's model: adapters, their first or their stored values."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from llmtune.engine.distributed import Rank
from llmtune.engine.partitions import gather
from llmtune.model.token_folder import find_token_ids, find_token_numbers
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.weights.partition_edit import write_own
from llmtune.train.adapters.start import begin_from_base, take_from_base
from llmtune.train.request import RunRequest
from llmtune.tuner.head import Head
from llmtune.tuner.lora_settings import begins_from_base, changes_base
from llmtune.tuner.peft_model import load_adapter
from llmtune.tuner.start_factors import set_start
from llmtune.tuner.token_rows.settings import find_texts, with_numbers
from llmtune.tuner.token_rows.tables import with_new_tokens
from llmtune.tuner.tuner import TUNERS


def attach_tuner(model: Any, request: RunRequest, rank: Rank, head: Head) -> Any:
    """Return the model that is trained, with the adapter of a checkpoint where there is one.

    Collective under ZeRO 3, and where an adapter begins with a part of the base's weights.

    Raises:
        CheckpointError: The adapter that training begins from, or resumes, is another one.
    """
    config = request.config
    tuner = TUNERS.find(config.tuner.kind)
    settings = config.tuner
    if texts := find_texts(settings):
        tokenizer = load_tokenizer(request.model_folder, config.model)
        numbers = find_token_numbers(tokenizer, texts, config.model.name_or_path)
        settings = with_numbers(settings, numbers)
    tokens = find_token_ids(request.model_folder, settings.new_tokens)
    settings = with_new_tokens(model, settings, tokens)
    model = tuner.attach(model, settings, request.base_name, config.seed, head, gather)
    if not tuner.has_adapter:
        return model
    has_start = changes_base(config.tuner)
    adapter = request.resume_from or config.tuner.adapter_path
    if adapter is not None:
        write = partial(write_own, rank=rank.rank)
        start = load_adapter(model, Path(adapter).expanduser(), has_start, write)
        take_from_base(model, start, rank)
    elif begins_from_base(config.tuner):
        start = begin_from_base(model, config.tuner.init_lora_weights, config.seed, rank)
    if not has_start:
        return model
    # Only the rank that writes the adapter needs the values again.
    place = "cpu" if rank.is_first else "meta"
    set_start(model, {name: factors.to(place) for name, factors in start.items()})
    return model
