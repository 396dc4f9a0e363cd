"""Write a model of random weights with a small tokenizer, for tests and for trying geometries."""

from __future__ import annotations

import builtins
from importlib import resources
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

#: Size of the tokenizer; a larger ``vocab_size`` of the model leaves rows that no token uses.
MAX_TOKENS = 512


def write_random_model(architecture: dict[str, Any], folder: Path) -> None:
    """Write the config, bf16 weights (seed 0) and tokenizer of an architecture.

    Args:
        architecture: Its settings, as in ``config.json``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer(int(architecture.get("vocab_size", MAX_TOKENS)))
    settings = dict(architecture)
    config = AutoConfig.for_model(
        str(settings.pop("model_type")),
        **settings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer(vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with the ChatML template on Python's docstrings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, MAX_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        str(getattr(builtins, name).__doc__)
        for name in ("str", "int", "dict", "list", "open", "print", "zip")
    ]
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = (
        Path(str(resources.files("llmtune.conf"))) / "chat_template" / "chatml.jinja"
    ).read_text()
    return tokenizer
