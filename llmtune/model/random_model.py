"""Write a model of random weights with a small tokenizer, for tests and for trying geometries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llmtune.model.random_tokenizer import (
    MAX_TOKENS,
    build_bert_tokenizer,
    build_roberta_tokenizer,
    build_tokenizer,
)
from llmtune.plan.abilities import is_encoder


def write_random_model(architecture: dict[str, Any], folder: Path) -> None:
    """Write the config, bf16 weights (seed 0) and tokenizer of an architecture.

    Encoders predict masked tokens, and have a tokenizer of BERT's kind or of RoBERTa's. All others
    are causal language models.

    Args:
        architecture: Its settings, as in ``config.json``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    settings = dict(architecture)
    kind = str(settings.pop("model_type"))
    encodes = makes_encoder(architecture)
    if encodes:
        tokenizer = _build_encoder_tokenizer(kind, settings)
    else:
        tokenizer = build_tokenizer(int(settings.get("vocab_size", MAX_TOKENS)))
    named = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if encodes:
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        named |= {"bos_token_id": first, "eos_token_id": last}
        named |= {"cls_token_id": first, "sep_token_id": last}
    config = AutoConfig.for_model(kind, **{**settings, **named})
    model_class: Any = AutoModelForMaskedLM if encodes else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class.from_config(config, trust_remote_code=False).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def makes_encoder(architecture: dict[str, Any]) -> bool:
    """Tell whether :func:`write_random_model` makes an encoder of these settings."""
    from transformers import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[str(architecture["model_type"])]
    two_sided = getattr(defaults, "is_encoder_decoder", False)
    return is_encoder(SimpleNamespace(**{"is_encoder_decoder": two_sided, **architecture}))


def _build_encoder_tokenizer(kind: str, settings: dict[str, Any]) -> Any:
    vocab_size = int(settings.get("vocab_size", MAX_TOKENS))
    positions = int(settings.get("max_position_embeddings", 512))
    sentences = settings.get("type_vocab_size", 2 if kind == "bert" else 0)
    if "roberta" in kind or sentences == 1:
        # The positions of tokens begin after that of the padding token, which is number 1.
        return build_roberta_tokenizer(vocab_size, positions - 2)
    return build_bert_tokenizer(vocab_size, positions, sentences > 1)
