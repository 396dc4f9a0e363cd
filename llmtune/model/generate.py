"""Generate answers to prompts, a batch at once, for the samples of a run and for ``chat``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmtune.errors import DataError
from llmtune.model.chat_turns import end_of_turn_ids, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int,
    temperature: float = 0.0,
    device: torch.device | None = None,
    synced_ranks: bool = False,
) -> list[str]:
    """Generate one answer per prompt.

    Args:
        prompts: Lists of ``{role, content}``, or texts that have been through the chat template.
        temperature: 0 always takes the most likely token.
        device: Where the model computes; offloaded parameters may be elsewhere.
        synced_ranks: All ranks generate until the last has finished, as ZeRO 3 needs.

    Raises:
        ConfigError: The chat template refuses a conversation.
        DataError: A prompt contains a token that the model has no embedding for.
    """
    from transformers import GenerationConfig

    # The prompts as tokens. Padding is on the left, because the answer follows the last token.
    texts = [p if isinstance(p, str) else render_prompt(tokenizer, p) for p in prompts]
    encoded = tokenizer(
        texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left"
    )
    _check_tokens(model, tokenizer, encoded["input_ids"])

    # One call for all prompts; the model returns to the mode that it had.
    device = device or next(model.parameters()).device
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=encoded["input_ids"].to(device),
            attention_mask=encoded["attention_mask"].to(device),
            generation_config=settings,
            synced_gpus=synced_ranks,
        )
    model.train(was_training)

    answers = output[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _check_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> None:
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = int(ids.max()) if ids.numel() else -1
    if rows is not None and largest >= rows:
        raise DataError(
            f"the prompt holds token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and"
            f" the model has embeddings for {rows}: take the tokenizer that the model was saved"
            " with, or another data.chat_template"
        )
