"""Make a small tokenizer of Python's docstrings, of the kind that an architecture is used with."""

from __future__ import annotations

import builtins
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
#: In the order of RoBERTa's vocabulary, whose positions begin after the number of ``<pad>``.
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

#: Size of the tokenizer; a larger ``vocab_size`` of the model leaves rows that no token uses.
MAX_TOKENS = 512


def _corpus() -> list[str]:
    names = ("str", "int", "dict", "list", "open", "print", "zip")
    return [str(getattr(builtins, name).__doc__) for name in names]


def build_tokenizer(vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with the ChatML template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_byte_level(vocab_size, SPECIAL_TOKENS),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = (
        Path(str(resources.files("llmtune.conf"))) / "chat_template" / "chatml.jinja"
    ).read_text()
    return tokenizer


def _train_byte_level(vocab_size: int, special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, MAX_TOKENS),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(), trainer)
    return backend


def build_bert_tokenizer(vocab_size: int, max_length: int, tells_sentences: bool = True) -> Any:
    """Build a WordPiece tokenizer: ``[CLS] a [SEP] b [SEP]``.

    Args:
        max_length: Positions of the model.
        tells_sentences: The model is told of each token to which of a pair it belongs.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in _corpus():
        pieces = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    tokens = _choose_pieces(words)[: min(vocab_size, MAX_TOKENS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.decoder = decoders.WordPiece()
    first, end = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", first), ("[SEP]", end)],
    )
    inputs = ["input_ids", "attention_mask"]
    if tells_sentences:
        inputs.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
        model_input_names=inputs,
    )


def _choose_pieces(words: Counter[str]) -> list[str]:
    """List special tokens, letters, letters within words, and words, most frequent first.

    The library's trainer numbers the pieces in another order each time.
    """
    letters = sorted(set("".join(words)))
    frequent = sorted(words, key=lambda word: (-words[word], word))
    within = [f"##{letter}" for letter in letters]
    return [*BERT_TOKENS, *letters, *within, *(word for word in frequent if len(word) > 1)]


def build_roberta_tokenizer(vocab_size: int, max_length: int) -> Any:
    """Train a byte-level BPE tokenizer: ``<s> a </s></s> b </s>``.

    Args:
        max_length: Positions of the model that tokens can have.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = _train_byte_level(vocab_size, ROBERTA_TOKENS)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", backend.token_to_id("</s>")),
        ("<s>", backend.token_to_id("<s>")),
        add_prefix_space=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
