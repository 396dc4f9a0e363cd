"""Load the tokenizer of a model folder, with its chat template and padding token set."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError
from llmtune.plan.memory.corrected_architecture import corrected_settings
from llmtune.process import no_collection
from llmtune.template_bounds import bounded_template, refuse_powers
from llmtune.template_errors import TEMPLATE_ERRORS, describe_template_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    folder: Path, config: ModelConfig, chat_template: str | None = None, code_of: Path | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, set a padding token if it has none, and replace the chat template if given.

    Args:
        chat_template: Text of a Jinja template.
        code_of: The base's folder, if ``folder`` is an adapter's. Allowing a base's own code does
            not allow an adapter's, which may be somebody else's; the base's class then reads the
            adapter's tokens.

    Raises:
        ConfigError: ``model.pad_token`` is not a token, or the tokenizer has no fast
            implementation.
    """
    with no_collection():
        from transformers import AutoConfig, AutoTokenizer

    # The class of an adapter's tokenizer is the base's, so that no code of the adapter runs.
    tokenizer: PreTrainedTokenizerBase
    if config.trust_remote_code and code_of is not None:
        kind = type(AutoTokenizer.from_pretrained(str(code_of), trust_remote_code=True))
        tokenizer = kind.from_pretrained(str(folder))
    else:
        # Without a class of its own in the folder, the tokenizer is that of the architecture.
        settings = corrected_settings(folder)
        architecture = AutoConfig.for_model(**settings) if settings else None
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=config.trust_remote_code, config=architecture
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{folder}: the tokenizer has no fast implementation (tokenizer.json), and masks need"
            " token offsets"
        )

    # A padding token.
    if config.pad_token is not None:
        if config.pad_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"model.pad_token={config.pad_token}: not in the vocabulary of"
                f" {config.name_or_path}"
            )
        tokenizer.pad_token = config.pad_token
    elif tokenizer.pad_token is None:
        # Harmless: padding is masked by position, not by token id.
        tokenizer.pad_token = tokenizer.eos_token

    # The chat template, which must not compute huge powers.
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    template: Any = tokenizer.chat_template
    # transformers allows several templates by name.
    templates = list(template.values()) if isinstance(template, dict) else [template]
    for text in filter(None, templates):
        refuse_powers(text)
    return tokenizer


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
