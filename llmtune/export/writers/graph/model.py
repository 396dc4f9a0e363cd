"""A model of transformers as a graph sees it: tensors in, one tensor out; and batches that tell
whether a graph is that model.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.architecture import (
    MASKED_WORDS,
    STATES,
    TEXT,
    TEXT_CLASSES,
    TOKEN_CLASSES,
    find_architecture,
    task_of,
)
from llmtune.export.sources.base import some
from llmtune.storage.plain_json import parse_json

#: Largest difference between an output of the graph and transformers', both in fp32.
MOST_DIFFERENCE = 1e-3

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: Rows and tokens of the batch that a graph is made from; no check has either.
_EXAMPLE = (2, 7)
_CHECKS = ((1, 1), (3, 13), (5, 2), (4, 33), (1, 512))

#: What a graph is made of: one tensor comes out.
_TASKS = (TEXT, TEXT_CLASSES, TOKEN_CLASSES, MASKED_WORDS, STATES)

#: A graph's only output, from its inputs in order.
Run = Callable[[tuple[torch.Tensor, ...]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Check:
    """A batch, and what transformers makes of it."""

    inputs: tuple[torch.Tensor, ...]
    """Ids, padding mask and, where the model takes them, token types; each (batch, length)."""
    expected: torch.Tensor


class GraphModel(torch.nn.Module):
    """A model of transformers with nothing but tensors going in and one tensor coming out."""

    def __init__(
        self, model: Any, inputs: tuple[str, ...], output: str, settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.output = output
        """``logits``, or ``last_hidden_state`` of a model without a head."""
        self.settings = settings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output for ids and mask of shape (batch, length)."""
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **given, **self.settings
        )
        found: torch.Tensor = outputs[self.output]
        return found


def find_loader(folder: Path) -> tuple[str, str]:
    """The class of transformers for what ``config.json`` names, and that name.

    Raises:
        ExportError: It names something else than an encoder or a decoder of text.
    """
    architecture = find_architecture(folder)
    task = task_of(architecture)
    if task is None or task not in _TASKS or _has_both_halves(folder):
        ends = ", ".join(end for task in _TASKS for end in task.ends)
        raise ExportError(
            f"{folder / 'config.json'}: {architecture or 'no architecture'} is neither an encoder"
            f" nor a decoder of text; graphs are written of {ends}; take export=safetensors"
        )
    return task.loader, architecture


def _has_both_halves(folder: Path) -> bool:
    return bool(parse_json((folder / "config.json").read_text()).get("is_encoder_decoder"))


def load_graph_model(folder: Path, loader: str, architecture: str) -> GraphModel:
    """The model in fp32 on the CPU, with the attention that exporters understand.

    Raises:
        ExportError: transformers cannot load it, or some of its weights are not there.
    """
    import transformers

    with _quiet():
        try:
            model, report = getattr(transformers, loader).from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                trust_remote_code=False,
            )
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise ExportError(
                f"transformers cannot load {architecture} with {loader}: {first_line(error)}; take"
                " export=safetensors"
            ) from error
    # A model without a head gives its last states, which do not go through the pooler.
    bare = loader == "AutoModel"
    missing = sorted(
        name for name in report["missing_keys"] if not (bare and name.startswith("pooler."))
    )
    if missing:
        raise ExportError(
            f"{architecture} in config.json has {len(missing)} weights that are not there:"
            f" {some(missing)}; nothing was written"
        )
    accepted = inspect.signature(model.forward).parameters
    types = "token_type_ids" in accepted and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    settings: dict[str, Any] = {"return_dict": True}
    if "use_cache" in accepted:
        settings["use_cache"] = False
    return GraphModel(
        model.requires_grad_(False),
        _INPUTS if types else _INPUTS[:2],
        "last_hidden_state" if bare else "logits",
        settings,
    ).eval()


def make_example(model: GraphModel) -> tuple[torch.Tensor, ...]:
    """The batch that a graph is made from."""
    return _make_batch(model, *_EXAMPLE)


@torch.no_grad()
def make_checks(model: GraphModel) -> list[Check]:
    """Batches of several sizes and lengths, padded on either side, with what the model makes of
    them.
    """
    checks = []
    for number, (rows, length) in enumerate(_CHECKS):
        inputs = _make_batch(model, rows, min(length, _most_tokens(model)), left=number % 2 == 0)
        checks.append(Check(inputs, model(*inputs).clone()))
    return checks


def _make_batch(
    model: GraphModel, rows: int, length: int, left: bool = False
) -> tuple[torch.Tensor, ...]:
    """Random ids and token types; every row but the first is padded a little more than the one
    before.
    """
    config = model.model.config
    numbers = torch.Generator().manual_seed(rows * 1000 + length)
    ids = torch.randint(config.vocab_size, (rows, length), generator=numbers)
    padding = (torch.arange(rows) * max(1, length // (rows + 1))).clamp(max=length - 1)
    places = torch.arange(length).expand(rows, length)
    mask = places >= padding[:, None] if left else places < length - padding[:, None]
    ids = torch.where(mask, ids, getattr(config, "pad_token_id", None) or 0)
    types = torch.randint(getattr(config, "type_vocab_size", 1), (rows, length), generator=numbers)
    return (ids, mask.long(), types)[: len(model.inputs)]


def compare_graph(run: Run, checks: Iterable[Check], name: str) -> float:
    """Run every batch; the largest difference where there is no padding.

    Raises:
        ExportError: It is larger than ``MOST_DIFFERENCE``, not a number, or the graph cannot run a
            batch.
    """
    worst = 0.0
    for check in checks:
        rows, length = check.inputs[0].shape
        try:
            found = run(check.inputs)
        except Exception as error:
            raise ExportError(
                f"{name} cannot run {rows} rows of {length} tokens: {first_line(error)}; nothing"
                " was written"
            ) from error
        if found.shape != check.expected.shape:
            raise ExportError(
                f"{name} gives {tuple(found.shape)} for {rows} rows of {length} tokens,"
                f" transformers gives {tuple(check.expected.shape)}; nothing was written"
            )
        difference = (found - check.expected).abs()
        if difference.ndim == 3:
            difference = difference[check.inputs[1].bool()]
        largest = float(difference.max())
        if not largest <= MOST_DIFFERENCE:
            raise ExportError(
                f"{name} is not the model: with {rows} rows of {length} tokens its output differs"
                f" from transformers' by {largest:.2g}, allowed are {MOST_DIFFERENCE:g}; nothing"
                " was written, take export=safetensors"
            )
        worst = max(worst, largest)
    return worst


def _most_tokens(model: GraphModel) -> int:
    """Longest row; RoBERTa's positions begin behind the padding's."""
    most = getattr(model.model.config, "max_position_embeddings", None) or max(
        length for _, length in _CHECKS
    )
    tables = (
        module for name, module in model.named_modules() if name.endswith("position_embeddings")
    )
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return int(most) if padding is None else int(most) - padding - 1


@contextlib.contextmanager
def refusing(model: GraphModel, kind: str) -> Iterator[None]:
    """What torch's exporters raise is of many kinds, and always about a model that they cannot
    export.

    Raises:
        ExportError: Instead of any of them.
    """
    with _quiet(), torch.no_grad():
        try:
            yield
        except Exception as error:
            raise ExportError(
                f"torch {torch.__version__} cannot write {type(model.model).__name__} as {kind}:"
                f" {first_line(error)}; take export=safetensors"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither exporter means its warnings for who exports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_line(error: Exception) -> str:
    """What is short enough for a message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
