"""Train single rows of tables: layers that put them in the place of the tables' own.

The parameters have peft's names, shapes and values (``peft/tuners/trainable_tokens/layer.py``), and
so has the file. peft's own layer makes a changed copy of the whole table in every forward pass,
reads a weight that ZeRO 3 keeps in slices, and has a gradient as large as the table. Here the table
is left as it is, and what comes out of it is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llmtune.tuner.token_rows.settings import TOKEN_ROWS, TokenTable
from llmtune.tuner.whole_parameters import Gather

_CONTAINER, _ROWS = TOKEN_ROWS.strip(".").split(".")


class TokenRows(nn.Module):
    """The trained rows of one table; called with what the table computes."""

    def __init__(self, tokens: Sequence[int], rows: torch.Tensor):
        """Args:
        tokens: Numbers of the rows in the table.
        rows: Their first values, of shape (tokens, width).
        """
        super().__init__()
        self.default = nn.Parameter(rows)
        self.tokens: torch.Tensor
        numbers = torch.tensor(tokens, device=rows.device)
        self.register_buffer("tokens", numbers, persistent=False)


class InputRows(TokenRows):
    """Trained rows of input embeddings."""

    def __init__(self, tokens: Sequence[int], rows: torch.Tensor, table: Any):
        """Args:
        table: The module of the embeddings.
        """
        super().__init__(tokens, rows)
        self.row_of: torch.Tensor
        # One behind the last row stands for every other token.
        row_of = torch.full((table.num_embeddings,), len(tokens), device=rows.device)
        row_of[self.tokens] = torch.arange(len(tokens), device=rows.device)
        self.register_buffer("row_of", row_of, persistent=False)
        # torch's embeddings of padding have no gradient.
        padding = table.padding_idx
        self._padding = list(tokens).index(padding) if padding in tokens else None

    def forward(self, ids: torch.Tensor, embedded: torch.Tensor, scale: Any) -> torch.Tensor:
        """Replace the embeddings of the trained tokens.

        Args:
            ids: Of any shape.
            embedded: Embeddings of the table, of the shape of ``ids`` with a width.
            scale: The table's factor of its rows, a number or a tensor; None without one.
        """
        row = self.row_of[ids]
        is_trained = row < len(self.tokens)
        rows = functional.embedding(row * is_trained, self.default, padding_idx=self._padding)
        if scale is not None:
            rows = rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where(is_trained.unsqueeze(-1), rows, embedded)


class OutputRows(TokenRows):
    """Trained rows of an output projection."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Replace the logits of the trained tokens."""
        return _replace_logits(hidden, logits, self.default, self.tokens)


class TiedRows(nn.Module):
    """Trained rows of input embeddings that are the output projection too."""

    def __init__(self, source: InputRows):
        super().__init__()
        # In a tuple it is no submodule, which would name the parameter twice.
        self.source = (source,)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Replace the logits of the trained tokens."""
        (source,) = self.source
        return _replace_logits(hidden, logits, source.default, source.tokens)


def _replace_logits(
    hidden: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    # In place: logits are the largest tensor of a step, and a product does not keep its result.
    return logits.index_copy_(-1, tokens, functional.linear(hidden, rows))


def add_token_rows(model: Any, tables: Sequence[TokenTable], gather: Gather) -> None:
    """Train rows of tables of a model, beginning with the tables' own. Collective under ZeRO 3.

    Args:
        model: A transformers model.
        gather: Makes weights of the model whole while their values are looked at.
    """
    for table in tables:
        module = model.get_submodule(table.path)
        with gather([module.weight]):
            rows = module.weight.detach()[list(table.tokens)]
        if table.is_output:
            _put(module, OutputRows(table.tokens, rows), _change_logits)
            continue
        trained = InputRows(table.tokens, rows, module)
        _put(module, trained, _change_embeddings)
        if table.tied is not None:
            _put(model.get_submodule(table.tied), TiedRows(trained), _change_logits)


def _put(module: nn.Module, rows: nn.Module, change: Any) -> None:
    """Put trained rows into the module of a table, under peft's names."""
    module.add_module(_CONTAINER, nn.ModuleDict({_ROWS: rows}))
    module.register_forward_hook(change)


def _rows_of(module: Any) -> Any:
    return getattr(module, _CONTAINER)[_ROWS]


def _change_embeddings(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:
    return _rows_of(module)(inputs[0], output, getattr(module, "embed_scale", None))


def _change_logits(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:
    return _rows_of(module)(inputs[0], output)


def find_tied_readers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Yield the layers that read the rows of another one, with those."""
    for module in model.modules():
        if isinstance(module, TiedRows):
            yield module, module.source[0].default
