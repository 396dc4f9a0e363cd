"""Tiny models with random weights, of each task, as folders that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

WORDS = [
    *("the", "a", "cat", "dog", "runs", "sleeps", "very", "fast", "slow", "and"),
    *("in", "house", "river", "blue", "red", "green", "one", "two"),
]
PIECES = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_rows(file: Path, rows: list[Any]) -> Path:
    """A file of JSON lines; a text among the rows is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def sentence(number: int, words: int) -> str:
    return " ".join(
        WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(words)
    )


def make_bert_tokenizer(folder: Path) -> Any:
    """A tokenizer of words and letters, with BERT's special tokens and token types."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS[2:], *letters, *PIECES])}
    vocabulary.setdefault("the", len(vocabulary))
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer()
    backend.pre_tokenizer = BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_bert(folder: Path, kind: str, names: list[str], **settings: Any) -> Path:
    """A BERT of two layers with a head, whose logits are far apart.

    Args:
        kind: ``Sequence`` or ``Token``.
    """
    tokenizer = make_bert_tokenizer(folder)
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        pad_token_id=0,
        **settings,
    )
    model_class: Any = getattr(transformers, f"BertFor{kind}Classification")
    model_class(config).save_pretrained(folder)
    return folder
