"""Compare a graph with transformers' model, on batches of several sizes and paddings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from llmtune.errors import ExportError, first_line
from llmtune.export.writers.graph.graph_model import GraphModel

#: Largest difference between an output of the graph and transformers', both in fp32.
MOST_DIFFERENCE = 1e-3

#: Rows and tokens of the batch that a graph is traced with; no probe batch has either.
_EXAMPLE_SIZE = (2, 7)
_PROBE_SIZES = ((1, 1), (3, 13), (5, 2), (4, 33), (1, 512))

#: Computes a graph's only output from its inputs in order.
Run = Callable[[tuple[torch.Tensor, ...]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """A batch, and the output that transformers computes for it."""

    inputs: tuple[torch.Tensor, ...]
    """Ids, padding mask and, where the model takes them, token types; each (batch, length)."""
    expected: torch.Tensor


def make_example(model: GraphModel) -> tuple[torch.Tensor, ...]:
    """Return the batch that a graph is traced with."""
    return _make_batch(model, *_EXAMPLE_SIZE)


@torch.no_grad()
def make_probe_batches(model: GraphModel) -> list[ProbeBatch]:
    """Run the model on batches of several sizes and lengths, padded on either side."""
    batches = []
    for index, (rows, length) in enumerate(_PROBE_SIZES):
        inputs = _make_batch(model, rows, min(length, _most_tokens(model)), left=index % 2 == 0)
        batches.append(ProbeBatch(inputs, model(*inputs).clone()))
    return batches


def _make_batch(
    model: GraphModel, rows: int, length: int, left: bool = False
) -> tuple[torch.Tensor, ...]:
    """Draw ids and token types; every row but the first has more padding than the one before."""
    config = model.model.config
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
    padding = (torch.arange(rows) * max(1, length // (rows + 1))).clamp(max=length - 1)
    positions = torch.arange(length).expand(rows, length)
    mask = positions >= padding[:, None] if left else positions < length - padding[:, None]
    ids = torch.where(mask, ids, getattr(config, "pad_token_id", None) or 0)
    types = torch.randint(
        getattr(config, "type_vocab_size", 1), (rows, length), generator=generator
    )
    return (ids, mask.long(), types)[: len(model.inputs)]


def _most_tokens(model: GraphModel) -> int:
    """Return the length of the longest row; RoBERTa's positions begin behind the padding's."""
    longest = getattr(model.model.config, "max_position_embeddings", None) or max(
        length for _, length in _PROBE_SIZES
    )
    tables = (
        module for name, module in model.named_modules() if name.endswith("position_embeddings")
    )
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return int(longest) if padding is None else int(longest) - padding - 1


def compare_graph(run: Run, batches: Iterable[ProbeBatch], name: str) -> float:
    """Run every batch, and return the largest difference at positions without padding.

    Raises:
        ExportError: It is larger than ``MOST_DIFFERENCE``, not a number, or the graph cannot run a
            batch.
    """
    worst = 0.0
    for batch in batches:
        rows, length = batch.inputs[0].shape
        try:
            output = run(batch.inputs)
        except Exception as error:
            raise ExportError(
                f"{name} cannot run {rows} rows of {length} tokens: {first_line(error)}; nothing"
                " was written"
            ) from error
        if output.shape != batch.expected.shape:
            raise ExportError(
                f"{name} gives {tuple(output.shape)} for {rows} rows of {length} tokens,"
                f" transformers gives {tuple(batch.expected.shape)}; nothing was written"
            )

        # Outputs per token count only where there is no padding.
        difference = (output - batch.expected).abs()
        if difference.ndim == 3:
            difference = difference[batch.inputs[1].bool()]
        largest = float(difference.max())
        # NaN is not smaller than anything.
        if not largest <= MOST_DIFFERENCE:
            raise ExportError(
                f"{name} is not the model: with {rows} rows of {length} tokens its output differs"
                f" from transformers' by {largest:.2g}, allowed are {MOST_DIFFERENCE:g}; nothing"
                " was written, take export=safetensors"
            )
        worst = max(worst, largest)
    return worst
