"""Choose the tables of which single rows are trained: those of chosen tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.tuner.adapted_layers import find_saved_modules, is_named, linear_layers
from llmtune.tuner.head import in_modules
from llmtune.tuner.token_rows.settings import INDICES, NEW_TOKENS, TokenTable
from llmtune.tuner.whole_parameters import whole_shape


def find_token_tables(model: Any, tuner: TunerConfig) -> list[TokenTable]:
    """Find the tables of ``tuner.trainable_token_indices`` and ``tuner.new_tokens``.

    A list of tokens is for the input embeddings, and for the output projection where that is the
    same tensor, as in peft. New tokens have rows in both. Here they are counted as the rows behind
    the last one, and so are texts of tokens: their numbers are known when the tokenizer is
    (:func:`with_new_tokens`, :func:`llmtune.model.token_folder.find_token_numbers`).

    Args:
        model: A transformers model, on any device, under ZeRO 3 with slices of its parameters.

    Raises:
        ConfigError: The model has no such row or table, or trains the whole table.
    """
    if not tuner.trainable_token_indices and not tuner.new_tokens:
        return []
    tables, tied = _tables(model)
    inputs = next(iter(tables))
    by_path = _by_table(tuner.trainable_token_indices, tables)
    found = []
    for path, module in tables.items():
        asked = by_path.get(path, [])
        tokens = [token for token in asked if not isinstance(token, str)]
        rows, width = whole_shape(module.weight)
        if beyond := [token for token in tokens if token >= rows]:
            raise ConfigError(
                f"{INDICES}: {beyond[0]} is no row of {path}, which has {rows}, numbered from 0"
            )
        new = range(rows, rows + len(asked) - len(tokens) + len(tuner.new_tokens))
        table = TokenTable(
            path=path,
            tokens=(*tokens, *new),
            width=width,
            is_output=path != inputs,
            tied=tied if path == inputs else None,
        )
        if table.tokens:
            _check_table(model, table, tuner)
            found.append(table)
    return found


def with_new_tokens(model: Any, tuner: TunerConfig, numbers: Sequence[int]) -> TunerConfig:
    """Return the tuner's config with the new tokens among those whose rows are trained.

    Args:
        model: A transformers model that has rows for them.
        numbers: Of the tokens of ``tuner.new_tokens``.
    """
    if not numbers:
        return tuner
    tables, _ = _tables(model)
    by_path = _by_table(tuner.trainable_token_indices, tables)
    rows = {path: [*by_path.get(path, []), *numbers] for path in tables}
    return replace(tuner, trainable_token_indices=rows, new_tokens=[])


def _tables(model: Any) -> tuple[dict[str, Any], str | None]:
    """Return the tables with rows of tokens by their paths, and the path of a tied projection.

    The first is that of the input embeddings.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {names[id(inputs)]: inputs}
    if output is None:
        return tables, None
    if output.weight is inputs.weight:
        return tables, names[id(output)]
    return {**tables, names[id(output)]: output}, None


def _by_table(asked: Any, tables: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return ``tuner.trainable_token_indices`` by the paths of the tables."""
    if isinstance(asked, Mapping):
        return _resolve(asked, tables)
    return {next(iter(tables)): list(asked)} if asked else {}


def _resolve(asked: Mapping[str, list[Any]], tables: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the rows by the paths of the tables that are named by their ends."""
    resolved: dict[str, list[Any]] = {}
    for name, tokens in asked.items():
        paths = [path for path in tables if is_named(path, [name])]
        if len(paths) != 1 or paths[0] in resolved:
            raise ConfigError(
                f"{INDICES}: {name} is not one of the tables of which rows can be trained:"
                f" {', '.join(tables)}"
            )
        resolved[paths[0]] = tokens
    return resolved


def _check_table(model: Any, table: TokenTable, tuner: TunerConfig) -> None:
    """Refuse a table that is trained otherwise too, or that computes more than its rows.

    Raises:
        ConfigError: With the reason.
    """
    key = INDICES if tuner.trainable_token_indices else NEW_TOKENS
    for path in filter(None, (table.path, table.tied)):
        if in_modules(path, find_saved_modules(model, tuner)):
            raise ConfigError(
                f"{key} with tuner.modules_to_save={tuner.modules_to_save}: {path} is trained"
                " whole; leave one of the two out"
            )
        layer = model.get_submodule(path)
        if path in linear_layers(model):
            if tuner.target_modules != "all-linear" and is_named(path, tuner.target_modules):
                raise ConfigError(
                    f"{key} with tuner.target_modules={tuner.target_modules}: {path} has an"
                    " adapter, and peft reads no rows of a layer with one; leave one of the two out"
                )
            if layer.bias is not None:
                raise ConfigError(
                    f"{key}: {path} has a bias, which peft leaves out where rows of it are"
                    f" trained; take tuner.modules_to_save, or tuner=full"
                )
        elif not _looks_up(layer):
            raise ConfigError(
                f"{key}: {path} is a {type(layer).__name__}, which computes more than its rows;"
                " take tuner.modules_to_save, or tuner=full"
            )


def _looks_up(layer: Any) -> bool:
    """Tell whether a layer returns rows of its weight, or a multiple of them.

    peft asks for the factor by the same name (``BaseTunerLayer._get_embed_scale``).
    """
    from torch import nn

    is_plain = type(layer).forward is nn.Embedding.forward
    return isinstance(layer, nn.Embedding) and (is_plain or hasattr(layer, "embed_scale"))
