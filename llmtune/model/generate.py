"""Generate answers to prompts, a batch at once: for samples of a run, ``chat`` and ``predict``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmtune.errors import DataError
from llmtune.model.chat_turns import end_of_turn_ids, render_prompt
from llmtune.model.sampling import make_sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """The choice of the tokens of answers."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    draws: torch.Tensor | None = None
    """Numbers in [0, 1) that decide each token of each row. Shape (rows, max_new_tokens).

    So an answer depends on no other row of the batch. Without them torch's generator decides.

    """


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
    texts = [p if isinstance(p, str) else render_prompt(tokenizer, p) for p in prompts]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature)
    answers = generate_tokens(model, tokenizer, rows, decoding, device, synced_ranks)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def generate_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    device: torch.device | None = None,
    synced_ranks: bool = False,
) -> list[list[int]]:
    """Generate the tokens of one answer per prompt; padding may follow the end of an answer.

    Args:
        prompts: Token ids.
        device: As for :func:`generate`, as is ``synced_ranks``.

    Raises:
        DataError: A prompt contains a token that the model has no embedding for.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    # Padding is on the left, because the answer follows the last token.
    encoded = tokenizer.pad(
        {"input_ids": [list(prompt) for prompt in prompts]},
        padding_side="left",
        return_attention_mask=True,
        return_tensors="pt",
    )
    _check_tokens(model, tokenizer, encoded["input_ids"])

    # One call for all prompts; the model returns to the mode that it had.
    device = device or next(model.parameters()).device
    length = encoded["input_ids"].shape[1]
    is_drawn = decoding.temperature > 0 and decoding.draws is not None
    sampling: dict[str, Any] = {"do_sample": decoding.temperature > 0 and not is_drawn}
    if sampling["do_sample"]:
        sampling |= {"temperature": decoding.temperature, "top_p": decoding.top_p}
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=end_of_turn_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )
    processors = LogitsProcessorList()
    if decoding.draws is not None and is_drawn:
        draws = decoding.draws.to(device)
        sampler = make_sampler(draws, length, decoding.temperature, decoding.top_p)
        processors.append(sampler)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=encoded["input_ids"].to(device),
            attention_mask=encoded["attention_mask"].to(device),
            generation_config=settings,
            logits_processor=processors,
            synced_gpus=synced_ranks,
        )
    model.train(was_training)
    answers: list[list[int]] = output[:, length:].tolist()
    return answers


def _check_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> None:
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = int(ids.max()) if ids.numel() else -1
    if rows is not None and largest >= rows:
        raise DataError(
            f"the prompt holds token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and"
            f" the model has embeddings for {rows}: take the tokenizer that the model was saved"
            " with, or another data.chat_template"
        )
