"""A long text has the same tokens in windows as in one piece, whatever its tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from llmtune.data.tokenize import token_buffer
from llmtune.data.tokenize.token_buffer import TokenBuffer
from llmtune.data.tokenize.windows import LongEncoding, WindowTokenizer
from tests.data.tokenizers import load_smollm2

#: What the small tokenizers learn from, and what the texts are made of.
WORDS = (
    "one",
    "two",
    "three",
    "the",
    "there",
    "then",
    "don't",
    "it's",
    "Zürich",
    "straße",
    "naïve",
    "e\u0301a",
    "日本語",
    "東京都",
    "мир",
    "🙂",
    "👩‍👩‍👧",
    "x=[1,2]",
    "1234567890",
    "3.14",
    "http://a.b/c?d=e",
    "<|end|>",
    "##",
    "</w>",
    "\u200b",
    "ﬁ",
    "aaaaaaaa",
)
GAPS = (" ", " ", " ", "  ", "\n", "\n\n", "\t", "    ", "", "\r\n", "\u3000", "\xa0", ". ", ", ")

#: GPT-4's, which takes digits three at a time.
GPT4 = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    draw = random.Random(3)
    return ["".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(60)) for _ in range(200)]


def train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_level(prefix: bool, pattern: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )


def llama2() -> Tokenizer:
    """No words: BPE goes over the whole text, and each text gets a mark before it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bytes_of = [f"<0x{number:02X}>" for number in range(256)]
    train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<unk>", *bytes_of], show_progress=False
        ),
    )
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def unigram(split: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    train(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        ),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=split)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <unk>",
        pair="$A $B <unk>",
        special_tokens=[("<unk>", tokenizer.token_to_id("<unk>"))],
    )
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    train(
        tokenizer,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def words_only() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits()]
    )
    return train(
        tokenizer, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    )


def ends_of_words() -> Tokenizer:
    """CLIP's and GPT-1's kind of BPE, whose last letter of a word is another one."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, end_of_word_suffix="</w>", special_tokens=["[UNK]"], show_progress=False
    )
    return train(tokenizer, trainer)


def backwards() -> Tokenizer:
    """Takes digits three at a time from the end, however far away that is."""
    return byte_level(False, r"\p{N}{1,3}(?=(\p{N}{3})*(?:\P{N}|$))| ?\p{L}+|[^\p{L}\p{N}]+")


KINDS = {
    "byte-level BPE": lambda: byte_level(False),
    "byte-level BPE with a prefix": lambda: byte_level(True),
    "GPT-4's words": lambda: byte_level(False, GPT4),
    "SentencePiece BPE": llama2,
    "Unigram": lambda: unigram(True),
    "Unigram without words": lambda: unigram(False),
    "WordPiece": bert,
    "whole words": words_only,
    "BPE with ends of words": ends_of_words,
    "digits from the end": backwards,
}


@pytest.fixture(scope="module")
def tokenizers(cache: Path) -> dict[str, Tokenizer]:
    made = {name: make() for name, make in KINDS.items()}
    return {**made, "SmolLM2": load_smollm2(cache).backend_tokenizer}


def own_tokens(windows: LongEncoding) -> range:
    """The tokens of the text, without those that are put around it."""
    found = [
        token for token in range(-2, len(windows) + 2) if windows.token_to_chars(token) is not None
    ]
    own = range(found[0], found[-1] + 1) if found else range(0)
    assert found == list(own)
    return own


def check(backend: Tokenizer, text: str, window: int = 240) -> int:
    """Compare with the whole text; the number of windows."""
    pulses: list[int] = []
    for around in (True, False):
        whole = backend.encode(text, add_special_tokens=around)
        tokenizer = WindowTokenizer(backend, window, overlap=120, margin=30)
        windows = tokenizer.encode(text, around, pulse=pulses.append)
        assert windows.ids.tolist() == whole.ids
        own = own_tokens(windows)
        assert len(own) == len(backend.encode(text, add_special_tokens=False))
        # Each time that it is asked for, tokenizers makes a list of all of it.
        offsets = whole.offsets
        assert [windows.token_to_chars(token) for token in own] == [offsets[token] for token in own]
        # Windows are tokenized again in whatever order they are asked about.
        for token in own[:: -max(1, len(own) // 5)]:
            assert windows.token_to_chars(token) == offsets[token]
        assert windows.letters == len(text)
        assert len(windows) == len(whole)
    return len(pulses) // 2


TEXTS = st.lists(
    st.tuples(st.sampled_from(WORDS) | st.text(max_size=4), st.sampled_from(GAPS)), max_size=400
).map(lambda pairs: "".join(word + gap for word, gap in pairs))


@pytest.mark.parametrize("name", [*KINDS, "SmolLM2"])
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=TEXTS, window=st.integers(240, 500))
def test_windows_give_the_tokens_of_the_whole_text(
    name: str, text: str, window: int, tokenizers: dict[str, Tokenizer]
) -> None:
    check(tokenizers[name], text, window)


@pytest.mark.parametrize("name", [*KINDS, "SmolLM2"])
def test_a_text_of_words_is_cut_into_windows(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    draw = random.Random(5)
    text = "".join(
        draw.choice(("one", "two", "three", "the", "there")) + draw.choice((" ", " ", ". ", "\n"))
        for _ in range(5000)
    )
    assert check(tokenizers[name], text) > len(text) / 240, "the windows do not grow"


#: Texts without an end of a word, as a file that is no text may be.
ENDLESS = {
    "a letter": "a" * 6000,
    "letters": "".join(random.Random(1).choices("abcdefghij", k=6000)),
    "digits": "".join(random.Random(2).choices("0123456789", k=6000)),
    # Windows count threes from their own ends, and agree with each other, though not with the whole
    # text.
    "digits that are no threes": "".join(random.Random(2).choices("0123456789", k=6001)),
    "spaces": "one" + " " * 6000 + "two",
    "lines": "one" + "\n" * 6000,
    "signs": "=-" * 3000,
    "unknown": "\u0f3a" * 3000 + " one " * 300,
    "emoji": "👩‍👩‍👧" * 800,
    "characters": "日本語東京都" * 1000,
    "special tokens": "<|end|>" * 800,
    "digits and words": "1234567 one " * 30 + "1234567890" * 300 + " two" * 200,
}


@pytest.mark.parametrize("text", ENDLESS)
@pytest.mark.parametrize("name", [*KINDS, "SmolLM2"])
def test_so_does_a_text_without_words(
    name: str, text: str, tokenizers: dict[str, Tokenizer]
) -> None:
    check(tokenizers[name], ENDLESS[text])


def test_letters_and_tokens_find_each_other_as_in_an_encoding(
    tokenizers: dict[str, Tokenizer],
) -> None:
    text = "".join(corpus()[:3])
    for backend in tokenizers.values():
        for around in (True, False):
            whole, windows = (
                backend.encode(text, add_special_tokens=around),
                WindowTokenizer(backend, 240, 120, 30),
            )
            encoding = windows.encode(text, around)
            for at in range(len(text)):
                assert encoding.char_to_token(at) == whole.char_to_token(at)
            for token in own_tokens(encoding):
                assert encoding.token_to_chars(token) == whole.token_to_chars(token)
            assert encoding.token_to_chars(len(encoding)) is None


def test_enough_is_enough(tokenizers: dict[str, Tokenizer]) -> None:
    backend = tokenizers["WordPiece"]
    text = "one two " * 5000
    encoding = WindowTokenizer(backend, 240, 120, 30).encode(
        text, True, enough=lambda tokens, letters: tokens > 100
    )
    assert 100 < len(encoding) < 300
    assert encoding.letters < 1000
    whole = backend.encode(text)
    assert encoding.ids.tolist() == whole.ids[: len(encoding)], "no end where the text does not end"
    last = encoding.token_to_chars(len(encoding) - 1)
    assert last is not None
    assert last[1] <= encoding.letters <= whole.offsets[len(encoding)][0]


def test_a_token_can_be_appended(tokenizers: dict[str, Tokenizer]) -> None:
    encoding = WindowTokenizer(tokenizers["WordPiece"], 240, 120, 30).encode("one two " * 500, True)
    ids = encoding.ids.tolist()
    encoding.append([7])
    assert encoding.ids.tolist() == [*ids, 7]
    assert encoding.token_to_chars(len(ids)) is None, "it stands for no letters"


@given(
    chunks=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=12),
    begin=st.integers(0, 60),
    length=st.integers(0, 60),
)
def test_ids_in_a_file_are_those_in_memory(
    chunks: list[list[int]], begin: int, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    everything = [token for chunk in chunks for token in chunk]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_buffer, "MEMORY_TOKENS", 5)
        for buffer in (TokenBuffer(folder), TokenBuffer(None)):
            for chunk in chunks:
                buffer.append(np.array(chunk, dtype=np.int32))
            assert len(buffer) == len(everything)
            found = buffer.read(begin, begin + length)
            assert found.tolist() == everything[begin : begin + length]
    assert not list(folder.glob("tmp*")), "the file has no name"
