"""Render the turns of a chat for a model, and find the tokens that end its answers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from llmtune.errors import ConfigError
from llmtune.template_bounds import bounded_template
from llmtune.template_errors import TEMPLATE_ERRORS, describe_template_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Render a conversation as text, up to the beginning of the model's answer.

    Raises:
        ConfigError: The chat template refuses it, or does not end.
    """
    try:
        with bounded_template():
            return str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
    except TEMPLATE_ERRORS as error:
        roles = [message["role"] for message in messages]
        advice = "leave chat.system out, or take" if "system" in roles else "take"
        raise ConfigError(
            f"the chat template refuses the conversation ({', '.join(roles)}):"
            f" {describe_template_error(error)}; {advice} another data.chat_template"
        ) from error


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end an answer: end-of-text, and what the chat template puts after it."""
    ids = {tokenizer.eos_token_id}
    if tokenizer.chat_template and (rendered := _render_sample(tokenizer)):
        ids.add(tokenizer(rendered, add_special_tokens=False)["input_ids"][-1])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return sorted(token for token in ids if token is not None and token in special)


def _render_sample(tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a conversation that the chat template takes; some need a system prompt.

    The text is empty if it takes none.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for conversation in (messages, [{"role": "system", "content": "c"}, *messages]):
        with contextlib.suppress(*TEMPLATE_ERRORS), bounded_template():
            return str(tokenizer.apply_chat_template(conversation, tokenize=False)).rstrip()
    return ""
