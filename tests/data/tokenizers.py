"""Tokenizers for the tests of masks: SmolLM2's, with a template's special tokens and a BOS post-processor."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from llmtune.data.templates import load_chat_template
from llmtune.model.files import resolve_model_folder

#: Template -> (special tokens, BOS, end of turn).
FAMILIES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "llama2": (("<s>", "</s>"), "<s>", "</s>"),
    "llama3": (
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "chatml": (("<s>",), "<s>", "<|im_end|>"),
    "mistral": (("<s>", "</s>"), "<s>", "</s>"),
    "qwen": (("<s>",), "<s>", "<|im_end|>"),
}


def load_smollm2(cache: Any) -> Any:
    """SmolLM2's tokenizer."""
    from llmtune.config.compose import compose_config

    config = compose_config(["model=smollm2_135m"]).config
    return AutoTokenizer.from_pretrained(resolve_model_folder(config.model, cache))


def with_template(tokenizer: Any, name: str) -> Any:
    """The tokenizer as a model of that family has it: it puts a BOS before every text that it encodes by itself."""
    from tokenizers.processors import TemplateProcessing

    special, bos, end = FAMILIES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.bos_token, tokenizer.eos_token = bos, end
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    tokenizer.chat_template = load_chat_template(name)
    return tokenizer
