"""Load the tokenizer of a model folder, with its chat template and padding token set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError
from llmtune.plan.architecture.corrected_architecture import corrected_settings
from llmtune.process import no_collection
from llmtune.template_bounds import refuse_powers

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
