"""Two ranks that compute a row of 16,384 tokens: each the whole row, and then each its half."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers

from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.load.sequence_part import SequencePart
from llmtune.data.store.token_store import Row
from llmtune.engine.distributed import Rank, barrier
from llmtune.engine.head_exchange import exchanging_heads
from llmtune.varlen_attention import VARLEN, exchanging, leave_out_masks, register_varlen
from tests.joined import join_ranks

TOKENS = 16384


@contextmanager
def count_kept(kept: dict[int, int]) -> Iterator[None]:
    """Note the bytes of each storage that a forward pass keeps for its backward pass."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def compute(model: Any, batch: Batch) -> tuple[float, int, torch.Tensor]:
    """The summed loss of a batch, the bytes that its forward pass keeps, and the gradient."""
    model.zero_grad()
    kept: dict[int, int] = {}
    with count_kept(kept):
        logits = model(**batch.inputs, use_cache=False).logits[0, batch.targets.positions]
        loss = torch.nn.functional.cross_entropy(logits, batch.targets.values, reduction="sum")
    total = sum(kept.values())
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return float(loss.detach()), total, gradient


def run(packed: bool, rank: Rank) -> dict[str, Any]:
    """Compare a whole row on each rank with a half on each."""
    register_varlen()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
    leave_out_masks(model)

    # One row, of one document or of several.
    documents = (9000, 3000, 250, 4134) if packed else (TOKENS,)
    ids = torch.randint(3, 128, (TOKENS,)).numpy().astype(np.int32)
    mask = np.ones(TOKENS, bool)
    mask[np.cumsum([0, *documents[:-1]])] = False
    row = Row(ids=ids, mask=mask, documents=documents)
    whole = Collator(pad_token_id=0, varlen=True, flat=True).pack([row])

    with exchanging(None):
        loss, kept, gradient = compute(model, whole)
    with exchanging_heads(rank, 2):
        own, shared_kept, shared_gradient = compute(model, SequencePart(rank.rank, 2).cut(whole, 0))
    summed = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(summed)
    dist.all_reduce(shared_gradient)
    count = len(whole.targets)
    return {
        "tokens": int(whole.input_ids.numel()),
        "loss": loss / count,
        "shared_loss": float(summed) / count,
        "gradient_difference": float((shared_gradient - gradient).norm() / gradient.norm()),
        "bytes": kept,
        "shared_bytes": shared_kept,
    }


if __name__ == "__main__":
    this = join_ranks()
    results = [run(packed, this) for packed in json.loads(sys.argv[1])]
    if this.is_first:
        Path(sys.argv[2]).write_text(json.dumps(results))
    barrier(this)
    os._exit(0)
