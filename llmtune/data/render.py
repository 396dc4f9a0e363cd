"""A conversation becomes token ids and a mask of what is trained.

The mask is decided by position in the rendered text, never by token id: the template is rendered up to each answer
and with it, and what the answer added, up to and including its end-of-turn token, is trained. So the padding token may
be the end-of-turn token without harm, and templates need no generation marks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from llmtune.config.schema import Overlong
from llmtune.data.conversation import Conversation, Role
from llmtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row: ``input_ids`` and the equally long ``mask`` of trained positions."""

    input_ids: list[int]
    mask: list[bool]
    truncated: bool = False


def load_chat_template(name: str | None) -> str | None:
    """The text of a named template of ``conf/chat_template/`` or of a ``.jinja`` file.

    Raises:
        ConfigError: Neither exists.
    """
    if name is None:
        return None
    folder = Path(str(resources.files("llmtune.conf"))) / "chat_template"
    path = Path(name).expanduser() if name.endswith(".jinja") else folder / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
        raise ConfigError(f"data.chat_template={name}: no such template; there are {known}, or a .jinja file")
    return path.read_text(encoding="utf-8")


def check_chat_template(tokenizer: PreTrainedTokenizerBase, model_name: str) -> None:
    """Refuse a tokenizer without a template: guessing one trains a model that no other tool prompts right.

    Raises:
        ConfigError: There is no template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {model_name} has no chat template (a base model?): add data.chat_template=llama3, "
            "llama2, chatml, or a .jinja file"
        )


def render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    overlong: Overlong,
    train_on_inputs: bool = False,
) -> Rendered | None:
    """Token ids and mask of one row, at most ``max_seq_length`` long; None when it was dropped as over-long.

    Raises:
        DataError: The prompt alone is too long, the template cannot be masked, or ``overlong`` is ``raise``.
    """
    text, spans = _render_text(conversation, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    mask = _mask(offsets, spans)
    if not any(mask):
        raise DataError(f"{conversation.where}: no token of the answer is left after rendering")
    end = len(mask) - mask[::-1].index(True)
    _check_end_of_turn(ids[end - 1], tokenizer, conversation)
    # Nothing behind the last trained token can matter.
    row: Rendered | None = Rendered(ids[:end], mask[:end])
    if end > max_seq_length:
        row = _shorten(ids[:end], mask[:end], max_seq_length, overlong, conversation.where)
    if row is not None and train_on_inputs:
        return replace(row, mask=[True] * len(row.input_ids))
    return row


def _shorten(ids: list[int], mask: list[bool], max_seq_length: int, overlong: Overlong, where: str) -> Rendered | None:
    """What becomes of a row that is too long."""
    first = mask.index(True)
    # The last place is for the end of the turn, and at least one token of an answer must stand before it.
    if first >= max_seq_length - 1:
        raise DataError(
            f"{where}: the prompt alone has {first} tokens, which leaves no room for an answer within "
            f"data.max_seq_length={max_seq_length}; shorten the row, or take data.max_seq_length={len(ids)}"
        )
    if overlong is Overlong.error:
        raise DataError(
            f"{where}: the row has {len(ids)} tokens, more than data.max_seq_length={max_seq_length}; "
            "take data.overlong=drop or truncate, or a larger data.max_seq_length"
        )
    if overlong is Overlong.drop:
        return None
    return _truncate(ids, mask, max_seq_length)


def _truncate(ids: list[int], mask: list[bool], length: int) -> Rendered:
    """Cut a row; its last answer keeps an end-of-turn token, so that the model still learns to stop."""
    keep = length - 1
    if mask[keep - 1]:
        return Rendered([*ids[:keep], ids[-1]], [*mask[:keep], True], truncated=True)
    # The cut falls into what somebody else says: end with the answer before it, whose turn ended by itself.
    end = keep - mask[:keep][::-1].index(True)
    return Rendered(ids[:end], mask[:end], truncated=True)


def _render_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and the character spans of the answers with their end-of-turn token."""
    messages = [message.to_dict() for message in conversation.messages]
    spans = []
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        for index, message in enumerate(conversation.messages):
            if message.role is not Role.assistant:
                continue
            prefix = str(tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True))
            upto = str(tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)).rstrip()
            if not (upto.startswith(prefix) and text.startswith(upto)):
                raise DataError(
                    f"{conversation.where}: the chat template renders the answer in message {index} differently with "
                    "and without what surrounds it, so its tokens cannot be told apart; take another data.chat_template"
                )
            spans.append((len(prefix), len(upto)))
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"{conversation.where}: the chat template refuses the row: {error}") from error
    return text, spans


def _mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token lies in, or reaches into, one of the spans; both are sorted."""
    mask = []
    index = 0
    for start, end in offsets:
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        mask.append(index < len(spans) and start < end and end > spans[index][0] and start < spans[index][1])
    return mask


def _check_end_of_turn(token: int, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
    if token not in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
        raise DataError(
            f"{conversation.where}: the chat template does not end an answer with a special token "
            f"(the last one is {tokenizer.decode([token])!r}), so the model would never learn to stop; "
            "take another data.chat_template"
        )
