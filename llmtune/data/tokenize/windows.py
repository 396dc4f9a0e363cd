"""Tokenize long texts in windows: exactly the tokens of the whole text, in the memory of a window.

An encoding takes some 200 bytes per letter, so that of a text of 60 MB would take 12 GB. Windows
overlap, and are joined where it is certain that a token begins in the whole text too:

* In the middle of the overlap both windows have the same tokens at the same places. What a window's
  border changes (a prefix that the tokenizer puts before a text, a word or a special token that is
  cut) is left behind, or not yet reached.
* There a word of the pre-tokenizer begins. It goes from left to right, so that what follows is that
  of the whole text; and the model sees each word by itself.
* Or, where a text has no words (SentencePiece), no token of the vocabulary holds the two letters
  around the place. Then no merge of BPE and no piece of Unigram crosses it, so that both sides
  are tokenized independently.

Where there is no such place, the window grows, to the whole text if need be.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.tokenize.token_buffer import TokenBuffer

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Letters of a window; shorter texts are tokenized whole.
WINDOW = 1 << 16

#: Letters that two windows share.
OVERLAP = 1 << 12

#: Letters from the borders of the overlap on that are not looked at.
MARGIN = 1 << 10

#: Called between windows with the tokens that a text has so far, to show that work makes progress.
Pulse = Callable[[int], None]


#: Returned for a letter after a part; it is no number of a token.
_BEHIND = -1


class LongEncoding:
    """The part of an ``Encoding`` of tokenizers that is used, for a long text.

    Of each token it holds the id alone, on disk where there are many. Letters are asked for at the
    borders of what is trained, and the windows around these are tokenized again.
    """

    def __init__(
        self, again: Callable[[int, int], _Window], before: list[int], folder: Path | None = None
    ):
        """Args:
        again: Tokenizes the window from one letter to another.
        before: Tokens that are put before the text.
        folder: For the ids of a text of millions of tokens; None keeps them in memory.
        """
        self.letters = 0
        """Letters of the text that are tokenized: all of them, or as many as were enough."""
        self._again = again
        self._ids = TokenBuffer(folder)
        self._parts: list[_Part] = []
        #: Of each part: the letter where the next one begins, and the number of its first token.
        self._letters, self._numbers = array("q"), array("q")
        self._known: dict[int, tuple[NDArray[np.int32], NDArray[np.int32]]] = {}
        self.append(before)

    def add(self, window: _Window, first: int, last: int, letters: int) -> None:
        """Add the tokens that follow: some of a window, up to a letter of the text."""
        self._parts.append(_Part(begin=window.begin, end=window.end, first=first, last=last))
        self._letters.append(letters)
        self._numbers.append(len(self._ids))
        self._remember(len(self._parts) - 1, window)
        self._ids.append(window.ids[first:last])
        self.letters = letters

    def append(self, tokens: list[int]) -> None:
        """Append tokens without letters."""
        self._ids.append(np.array(tokens, dtype=np.int32))

    @property
    def ids(self) -> NDArray[np.int32]:
        """Return all ids, in memory. Shape (tokens,)."""
        return self.read(0, len(self))

    def read(self, begin: int, end: int) -> NDArray[np.int32]:
        """Return the ids from one token to another. Shape (end - begin,)."""
        return self._ids.read(begin, end)

    def release_text(self) -> TokenBuffer:
        """Return the ids alone, so that the text can be freed."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def char_to_token(self, at: int) -> int | None:
        """Return the first token of a letter; None where no token has it."""
        index = bisect.bisect_right(self._letters, at)
        found = self._find(index, at)
        # Where a space that the tokenizer puts before a word is a token without letters, a part may
        # begin with it, and the next token with a letter before it.
        found = self._find(index + 1, at) if found == _BEHIND else found
        return None if found == _BEHIND else found

    def _find(self, index: int, at: int) -> int | None:
        """Return the first token of a letter in a part.

        It is None where no token has the letter, ``_BEHIND`` where all tokens end before it.
        """
        if index >= len(self._parts):
            return None
        starts, ends = self._offsets(index)
        first = int(np.searchsorted(ends, at, side="right"))
        if first == len(ends):
            return _BEHIND
        for token in range(first, min(first + 2, len(starts))):
            if starts[token] <= at < ends[token]:
                return self._numbers[index] + token
        return None

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Return a token's first letter, and the one behind its last; None behind all tokens."""
        index = bisect.bisect_right(self._numbers, token) - 1
        if index < 0:
            return None
        starts, ends = self._offsets(index)
        at = token - self._numbers[index]
        return (int(starts[at]), int(ends[at])) if at < len(starts) else None

    def _offsets(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the first letters, and those behind the last, of the tokens of a part."""
        if index not in self._known:
            self._remember(index, self._again(self._parts[index].begin, self._parts[index].end))
        return self._known[index]

    def _remember(self, index: int, window: _Window) -> None:
        part = self._parts[index]
        # A row is asked about from its beginning to its end, and never far back.
        while len(self._known) > 1:
            del self._known[next(iter(self._known))]
        # Copies: a view would hold the whole window.
        self._known[index] = (
            window.starts[part.first : part.last].copy(),
            window.ends[part.first : part.last].copy(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Tokens of a part of the text, with places in the text. Shapes: (tokens,)."""

    begin: int
    end: int
    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    words: NDArray[np.int32]
    """Index of the pre-tokenizer's word that each token belongs to; -1 for none."""

    def within(self, low: int, high: int) -> tuple[int, int]:
        """Return the first token between two letters, and the one behind the last."""
        return int(np.searchsorted(self.starts, low)), int(
            np.searchsorted(self.ends, high, side="right")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The tokens of a window from one joint to the next."""

    begin: int
    """First letter of the window."""
    end: int
    """The letter behind its last."""
    first: int
    """The first token of the part, counted in the window."""
    last: int
    """The token behind its last."""


class _NotLocalError(Exception):
    """Tokens depend on letters that are far away."""


class WindowTokenizer:
    """Tokenizes long texts."""

    def __init__(
        self,
        backend: Any,
        window: int = WINDOW,
        overlap: int = OVERLAP,
        margin: int = MARGIN,
        folder: Path | None = None,
    ):
        """
        Args:
            backend: A ``Tokenizer`` of tokenizers, without truncation and padding.
            window: Letters of a window.
            overlap: Letters that two windows share.
            margin: Letters from its borders on that are not looked at.
            folder: For the ids of texts of millions of tokens; None keeps them in memory.
        """
        self._backend = backend
        self._folder = folder
        self._window, self._overlap, self._margin = window, overlap, margin

    def encode(
        self,
        text: str,
        add_special_tokens: bool,
        enough: Callable[[int, int], bool] | None = None,
        pulse: Pulse | None = None,
    ) -> LongEncoding:
        """Return the tokens of a text.

        Args:
            add_special_tokens: Put the tokens around it that the tokenizer puts around texts.
            enough: Told of tokens and letters so far; true stops.
        """
        before, behind = self._around if add_special_tokens else ([], [])

        def again(begin: int, end: int) -> _Window:
            return self._encode(text, begin, end - begin)

        encoding, tokens = LongEncoding(again, before, self._folder), 0
        try:
            for window, first, last, letters in self._parts(text):
                encoding.add(window, first, last, letters)
                tokens += last - first
                if pulse is not None:
                    pulse(tokens)
                if enough is not None and enough(tokens, letters):
                    break
        except _NotLocalError:
            # Tokens depend on letters far away: encode the text as a whole.
            whole, encoding = again(0, len(text)), LongEncoding(again, before, self._folder)
            encoding.add(whole, 0, len(whole.ids), len(text))
        if encoding.letters == len(text):
            encoding.append(behind)
        return encoding

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Return the tokens that are put before and behind a text."""
        # Not every vocabulary has every letter.
        for text in ("a", "A", "0", "."):
            encoding = self._backend.encode(text, add_special_tokens=True)
            own = [
                index for index, special in enumerate(encoding.special_tokens_mask) if not special
            ]
            if own:
                return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
        return self._backend.encode("", add_special_tokens=True).ids, []

    def _parts(self, text: str) -> Iterator[tuple[_Window, int, int, int]]:
        """Yield the windows with their tokens from joint to joint, and the letters so far."""
        window, done = self._encode(text, 0, self._window), 0
        while window.end < len(text):
            following = self._encode(text, window.end - self._overlap, self._window)
            joint = self._join(text, window, following)
            # A joint in front of the last one would give nothing.
            if joint is not None and joint[0] > done:
                here, there = joint
                yield window, done, here, int(following.starts[there])
                window, done = following, there
                continue
            grown = self._encode(text, window.begin, 2 * (window.end - window.begin))
            if not np.array_equal(grown.starts[: done + 1], window.starts[: done + 1]):
                # Letters far behind change tokens here.
                raise _NotLocalError
            window = grown
        yield window, done, len(window.ids), len(text)

    def _encode(self, text: str, begin: int, letters: int) -> _Window:
        end = min(len(text), begin + letters)
        encoding = self._backend.encode(text[begin:end], add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2) + begin
        words = [-1 if word is None else word for word in encoding.word_ids]
        ids = np.array(encoding.ids, dtype=np.int32)
        return _Window(
            begin=begin,
            end=end,
            ids=ids,
            starts=offsets[:, 0],
            ends=offsets[:, 1],
            words=np.array(words, dtype=np.int32),
        )

    def _join(self, text: str, window: _Window, following: _Window) -> tuple[int, int] | None:
        """Find a token that surely begins in the whole text, by its number in both windows."""
        low, high = following.begin + self._margin, window.end - self._margin
        (first, last), (other, other_last) = window.within(low, high), following.within(low, high)

        # In the middle of the overlap both windows must have the same tokens.
        for name in ("ids", "starts", "ends"):
            if not np.array_equal(
                getattr(window, name)[first:last], getattr(following, name)[other:other_last]
            ):
                return None
        # Those next to white space first, which nothing that groups letters or digits counts
        # across.
        middle, shift = (first + last) // 2, other - first
        numbers = sorted(
            range(first + 1, last),
            key=lambda n: (not _is_spaced(text, int(window.starts[n])), abs(n - middle)),
        )
        return next(
            (
                (n, n + shift)
                for n in numbers
                if self._is_border(text, window, following, n, n + shift)
            ),
            None,
        )

    def _is_border(
        self, text: str, window: _Window, following: _Window, here: int, there: int
    ) -> bool:
        at = int(window.starts[here])
        if window.ends[here - 1] > at or text[at - 1].isdigit() or text[at].isdigit():
            return False
        for part, index in ((window, here), (following, there)):
            before, behind = part.words[index - 1 : index + 1]
            if before < 0 or behind < 0 or before == behind:
                return self._never_joined(int(window.ids[here - 1]), int(window.ids[here]))
        return True

    def _never_joined(self, before: int, behind: int) -> bool:
        """Tell whether no token of the vocabulary holds the letters on both sides of a border."""
        if self._pairs is None:
            return False
        first, second = self._backend.id_to_token(before), self._backend.id_to_token(behind)
        unknown = {getattr(self._backend.model, "unk_token", None), self._unknown}
        # Bytes of letters that the vocabulary does not have, and unknown letters, which may become
        # one token.
        if any(
            token is None or token in unknown or token.startswith("<0x")
            for token in (first, second)
        ):
            return False
        return first[-1] + second[0] not in self._pairs

    @cached_property
    def _unknown(self) -> str | None:
        index = getattr(self._backend.model, "unk_id", None)
        return None if index is None else self._backend.id_to_token(index)

    @cached_property
    def _pairs(self) -> frozenset[str] | None:
        """Return pairs of letters in tokens; None where tokens depend on more than letters."""
        model: Any = self._backend.model
        kind = type(model).__name__
        pure = kind == "Unigram" or (
            kind == "BPE"
            and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
        )
        if not pure:
            return None
        every = self._backend.get_vocab(with_added_tokens=False)
        return frozenset(token[at : at + 2] for token in every for at in range(len(token) - 1))


def _is_spaced(text: str, at: int) -> bool:
    return text[at - 1].isspace() or text[at].isspace()
