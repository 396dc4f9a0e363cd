"""The keys of tokens whose rows are trained, and a table with such rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError

#: In the names of parameters with trained rows, which are peft's.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta."

INDICES = "tuner.trainable_token_indices"
NEW_TOKENS = "tuner.new_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """A table of the model, and the rows of it that are trained."""

    path: str
    """The module's name: of the input embeddings, or of an output projection of its own."""
    tokens: tuple[int, ...]
    """Numbers of the rows, in the order in which they are stored."""
    width: int
    is_output: bool
    tied: str | None = None
    """The name of the output projection whose weight is this table."""

    @property
    def parameter(self) -> str:
        """Return the name of the parameter with the rows, of shape (tokens, width)."""
        return f"{self.path}{TOKEN_ROWS}default"


def find_token_problems(tuner: TunerConfig) -> Iterator[str]:
    """Find impossible tokens, in words a user can act on."""
    yield from _find_index_problems(tuner)
    texts = tuner.new_tokens
    shown = f"{NEW_TOKENS}={texts}"
    if blank := [text for text in texts if not text.strip()]:
        yield f"{shown}: {blank[0]!r} is no token: it has no letter or sign"
    if twice := [text for text in texts if texts.count(text) > 1]:
        yield f"{shown}: {twice[0]} is there twice"
    if texts and tuner.adapter_path:
        yield f"{shown}{_with_adapter(tuner)}"


def _find_index_problems(tuner: TunerConfig) -> Iterator[str]:
    asked = tuner.trainable_token_indices
    if asked is None:
        return
    shown = f"{INDICES}={asked}"
    if isinstance(asked, Mapping):
        lists = list(asked.values())
        is_form = all(isinstance(one, list) and one for one in lists)
    else:
        lists, is_form = [asked], isinstance(asked, list)
    if not asked or not is_form:
        yield (
            f"{shown}: a list of tokens, by number or text, such as [5,'<think>'], or lists by"
            " table such as {embed_tokens: [5,6], lm_head: [5]}"
        )
        return
    for tokens in lists:
        wrong = [token for token in tokens if not _is_token(token)]
        twice = [token for token in tokens if tokens.count(token) > 1]
        if wrong:
            yield (
                f"{shown}: {wrong[0]!r} is neither the number of a token, counted from 0, nor a"
                " text"
            )
        elif twice:
            yield f"{shown}: {twice[0]} is there twice"
    if tuner.adapter_path:
        yield f"{shown}{_with_adapter(tuner)}"


def _is_token(token: Any) -> bool:
    if isinstance(token, str):
        return bool(token)
    # In Python a bool is an int.
    return type(token) is int and token >= 0


def find_texts(tuner: TunerConfig) -> list[str]:
    """Return the tokens of ``tuner.trainable_token_indices`` that are given as texts."""
    asked = tuner.trainable_token_indices or []
    lists = asked.values() if isinstance(asked, Mapping) else [asked]
    return [token for tokens in lists for token in tokens if isinstance(token, str)]


def with_numbers(tuner: TunerConfig, numbers: Mapping[str, int]) -> TunerConfig:
    """Return the tuner's config with numbers in place of the texts of tokens.

    Args:
        numbers: Text -> number of the token, for all of :func:`find_texts`.

    Raises:
        ConfigError: A row is named twice, by text and by number.
    """

    def to_numbers(tokens: list[int | str]) -> list[int]:
        found: dict[int, int | str] = {}
        for token in tokens:
            number = numbers[token] if isinstance(token, str) else token
            if number in found:
                raise ConfigError(
                    f"{INDICES}={tokens}: {token!r} and {found[number]!r} are the same token;"
                    " leave one of them out"
                )
            found[number] = token
        return list(found)

    asked = tuner.trainable_token_indices
    if not find_texts(tuner):
        return tuner
    if isinstance(asked, Mapping):
        by_table = {table: to_numbers(tokens) for table, tokens in asked.items()}
        return replace(tuner, trainable_token_indices=by_table)
    return replace(tuner, trainable_token_indices=to_numbers(asked))


def _with_adapter(tuner: TunerConfig) -> str:
    return (
        f" with tuner.adapter_path={tuner.adapter_path}: an adapter that is trained further keeps"
        " its own tensors; merge it with `export base= adapter= output_dir=`, and train on the"
        " merged model (model.name_or_path=)"
    )
