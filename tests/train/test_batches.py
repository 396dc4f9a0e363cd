"""What of a run's settings its parts are built from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtune.config.compose import compose_config
from llmtune.task.labels import Labels
from llmtune.train.builders.batches import build_collator


@pytest.mark.parametrize(
    ("kernel", "overrides", "varlen", "flat"),
    [
        ("varlen", [], True, True),
        ("varlen", ["data.packing=true"], True, True),
        ("flash_attention_2", [], True, False),
        ("sdpa", [], False, False),
        # The noise depends on the length of a row, so that no rows are joined, packed or not.
        ("varlen", ["train.neftune_noise_alpha=5"], False, False),
        ("varlen", ["train.neftune_noise_alpha=5", "data.packing=true"], False, False),
        ("flash_attention_2", ["train.neftune_noise_alpha=5", "data.packing=true"], True, False),
    ],
)
def test_rows_are_joined_for_kernels_that_take_borders(
    kernel: str, overrides: list[str], varlen: bool, flat: bool
) -> None:
    request: Any = SimpleNamespace(
        config=compose_config(["model=tiny", *overrides]).config,
        plan=SimpleNamespace(
            attn_implementation=kernel, batch=SimpleNamespace(sequence_parallel_size=1)
        ),
        labels=Labels(),
    )
    model: Any = torch.nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="llama"))
    rank: Any = SimpleNamespace(rank=0)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, model_input_names=[])
    collator = build_collator(request, rank, model, tokenizer)
    assert (collator.varlen, collator.flat) == (varlen, flat)
