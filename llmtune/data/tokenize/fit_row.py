"""Fit the tokens of a row into rows of at most ``max_seq_length``, with a mask of what is trained.

The mask is decided by position in the rendered text, never by token id: so the padding token may be
the end-of-turn token without harm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.config.groups.data import Overlong
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.span import Span
from llmtune.data.tokenize.token_row import Outcome, Overflow, SplitRows, TokenMask, TokenRow
from llmtune.data.tokenize.windows import LongEncoding
from llmtune.task.labels import Label, Tags

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRow:
    """A conversation as it goes to the tokenizer, without its messages."""

    index: int
    """Index of the conversation in its block."""
    text: str | tuple[str, ...]
    """A text, the pair of a row with a label, or the words of a row with tags."""
    spans: list[Span]
    """The answers in the text."""
    plain: bool
    """True if no chat template was used."""
    messages: int
    """Number of messages in the conversation."""
    has_answer: bool
    """One of them is the assistant's."""
    label: Label | None

    @property
    def letters(self) -> int:
        """Count the letters of the text, or of both texts of a pair."""
        return sum(map(len, self.text)) if isinstance(self.text, tuple) else len(self.text)


class ShortEncoding:
    """An ``Encoding`` of tokenizers, with the methods of :class:`LongEncoding`."""

    def __init__(self, encoding: Any):
        self._encoding = encoding
        self._ids: NDArray[np.int32] = np.asarray(encoding.ids, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, begin: int, end: int) -> NDArray[np.int32]:
        """Return the ids from one token to another. Shape (end - begin,)."""
        return self._ids[begin:end]

    def append(self, tokens: list[int]) -> None:
        """Append tokens without letters."""
        self._ids = np.append(self._ids, np.array(tokens, dtype=np.int32))

    def char_to_token(self, at: int) -> int | None:
        """Return the first token of a letter; None where no token has it."""
        token: int | None = self._encoding.char_to_token(at)
        return token

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Return a token's first letter, and the one behind its last; None where it has none."""
        if token >= len(self._encoding):
            return None
        letters: tuple[int, int] | None = self._encoding.token_to_chars(token)
        return letters


Tokens = ShortEncoding | LongEncoding


@dataclass(frozen=True, slots=True, kw_only=True)
class _Supervised:
    """The trained tokens of a row."""

    trained: list[tuple[int, int]]
    """Ranges of tokens: the first, and the one behind the last."""
    silent: list[tuple[int, int]]
    """Ranges of answers that messages exclude from training."""
    end_of_turn: int
    """The token that ends the last trained answer."""


class RowFitter:
    """Makes rows of tokens from encodings, whatever their length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: EncodeSettings):
        known: Any = tokenizer
        self._tokenizer = known
        self._settings = settings
        #: Tokens that may end a turn; some tokenizers do not call theirs special.
        self._turn_ends = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def fit(self, row: RenderedRow, encoding: Any) -> Outcome:
        """Return the rows of an encoding, or the overflow of a row that is left out.

        Args:
            encoding: An ``Encoding`` of tokenizers, a :class:`LongEncoding`, or None of a row that
                is too long and not to be cut.

        Raises:
            RowError: The row cannot be trained on.
        """
        if encoding is None:
            return self._overflow(0, "the row has more tokens than")
        if row.label is not None:
            return self._fit_labeled(row, encoding)
        tokens = encoding if isinstance(encoding, LongEncoding) else ShortEncoding(encoding)

        # Where the trained tokens are.
        if row.plain:
            self._end_text(tokens)
        supervised = self._find_supervised(row, tokens)
        begin = self._find_begin(row, tokens)
        # Nothing behind the last trained token can matter.
        end = max((behind for _, behind in supervised.trained), default=0)
        if end <= begin + 1:
            reason = "" if row.has_answer else ": there is no answer of the assistant"
            raise RowError(f"no token is trained{reason}")

        return self._cut(row, tokens, supervised, begin, end)

    def _overflow(self, tokens: int, described: str) -> Overflow:
        """Return the overflow of a row that is to be dropped.

        Raises:
            RowError: Such rows are not to be dropped.
        """
        if self._settings.overlong is Overlong.drop:
            return Overflow(tokens)
        raise RowError(f"{described} data.max_seq_length={self._settings.max_seq_length}")

    def _end_text(self, tokens: Tokens) -> None:
        """End plain text with the end-of-text token, whether or not the tokenizer put it there.

        Other tokens at the end, such as BERT's [SEP], stay where they are.
        """
        if self._eos is None:
            raise RowError("the tokenizer has no end-of-text token to end a text with")
        length = len(tokens)
        if not length or tokens.read(length - 1, length)[0] != self._eos:
            tokens.append([self._eos])

    def _find_supervised(self, row: RenderedRow, tokens: Tokens) -> _Supervised:
        trained: list[tuple[int, int]] = []
        silent: list[tuple[int, int]] = []
        end_of_turn = self._eos
        for start, end, train in row.spans:
            first, last = _token_range(tokens, start, end)
            if first <= last:
                (trained if train else silent).append((first, last + 1))
            if train and not row.plain:
                end_of_turn = self._find_end_of_turn(str(row.text), end, last, tokens)
        if row.plain:
            trained.append((len(tokens) - 1, len(tokens)))
        return _Supervised(trained=trained, silent=silent, end_of_turn=end_of_turn)

    def _find_end_of_turn(self, text: str, end: int, last: int, tokens: Tokens) -> int:
        """Find the last trained token of an answer, white space aside.

        Raises:
            RowError: It is none that ends a turn.
        """
        if text[end - 1].isspace():
            while end > 0 and text[end - 1].isspace():
                end -= 1
            last = _token_range(tokens, end - 1, end)[1]
        token = int(tokens.read(last, last + 1)[0])
        if token not in self._turn_ends:
            raise RowError(
                "the chat template does not end a trained answer with a special token (the last"
                f" one is {self._tokenizer.decode([token])!r}), so the model would never learn to"
                " stop; take another data.chat_template"
            )
        return token

    def _find_begin(self, row: RenderedRow, tokens: Tokens) -> int:
        """Find the first token of the row.

        It is 1 where the text has its own BOS token, and the tokenizer puts another before it.

        Raises:
            RowError: The chat template and the tokenizer both put one there.
        """
        first = tokens.read(0, 2)
        if self._bos is None or len(first) < 2 or not (first[0] == first[1] == self._bos):
            return 0
        if row.plain and self._settings.allow_special_tokens:
            return 1
        raise RowError("begins with two BOS tokens; take another data.chat_template")

    def _cut(
        self, row: RenderedRow, tokens: Tokens, supervised: _Supervised, begin: int, end: int
    ) -> Outcome:
        """Return the row within ``max_seq_length``, or what ``overlong`` makes of a longer one."""
        limit = self._settings.max_seq_length
        overlong = self._settings.overlong
        length = end - begin
        # The mask of what is learned; answers alone decide where a row is cut.
        trained = TokenMask(supervised.trained)
        mask = trained
        if self._settings.train_on_inputs:
            mask = TokenMask(supervised.silent, inverted=True)

        # A row that fits, is left out, or is split into several.
        if length <= limit:
            return [TokenRow(ids=tokens.read(begin, end), mask=mask.read(begin, end))]
        if overlong is Overlong.drop:
            return Overflow(length)
        if overlong is Overlong.split and row.messages == 1:
            if isinstance(tokens, LongEncoding):
                return SplitRows(
                    tokens=tokens.release_text(),
                    mask=mask,
                    begin=begin,
                    end=end,
                    max_seq_length=limit,
                )
            return list(
                SplitRows(tokens=tokens, mask=mask, begin=begin, end=end, max_seq_length=limit)
            )

        # Only a row that keeps something to learn is cut.
        first = _find_first(supervised.trained, begin)
        if first >= limit - 1:
            raise RowError(
                f"the prompt alone has {first} tokens, which leaves no room for an answer within"
                f" data.max_seq_length={limit}; shorten the row, or take"
                f" data.max_seq_length={length}"
            )
        if overlong is not Overlong.truncate:
            raise RowError(
                f"the row has {length} tokens, more than data.max_seq_length={limit}; take"
                " data.overlong=drop or truncate, or a larger data.max_seq_length"
            )
        kept = TokenRow(
            ids=tokens.read(begin, begin + limit), mask=trained.read(begin, begin + limit)
        )
        cut = _truncate(kept, limit, supervised.end_of_turn)
        if self._settings.train_on_inputs:
            cut = replace(cut, mask=mask.read(begin, begin + len(cut.ids)))
        return [cut]

    def _fit_labeled(self, row: RenderedRow, encoding: Any) -> Outcome:
        """The row of a text, a pair or words with a label, cut as transformers does it.

        Raises:
            RowError: It is too long, and not to be cut; or a word has no token.
        """
        limit, length = self._settings.max_seq_length, len(encoding)
        if length > limit:
            if self._settings.overlong is not Overlong.truncate:
                return self._overflow(length, f"the row has {length} tokens, more than")
            encoding = self._encode_cut(row)
        ids = np.asarray(encoding.ids, dtype=np.int32)
        if not isinstance(row.label, Tags):
            second = np.asarray(encoding.type_ids) == 1
            return [TokenRow(ids=ids, mask=second, truncated=length > limit, label=row.label)]

        # The first token of every word, and the tags of the words that are left.
        words = np.array([-1 if word is None else word for word in encoding.word_ids])
        first = (words >= 0) & np.concatenate([[True], words[1:] != words[:-1]])
        left = words[first].tolist()
        skipped = set(range(max(left, default=-1) + 1)).difference(left)
        if skipped or not left or (length <= limit and len(left) < len(row.label)):
            lost = min(skipped, default=len(left))
            raise RowError(
                f"the tokenizer has no token for word {lost} of 'tokens'"
                f" ({row.text[lost].strip()!r}), so that its tag belongs to nothing; take the word"
                " and its tag out"
            )
        tags = Tags(row.label[word] for word in left)
        return [TokenRow(ids=ids, mask=first, truncated=length > limit, label=tags)]

    def _encode_cut(self, row: RenderedRow) -> Any:
        """Encode a row again within the limit; of a pair, the longer text is cut first."""
        backend = self._tokenizer.backend_tokenizer
        backend.enable_truncation(
            self._settings.max_seq_length,
            strategy="longest_first",
            direction=self._tokenizer.truncation_side,
        )
        try:
            return backend.encode_batch(
                [row.text], add_special_tokens=True, is_pretokenized=isinstance(row.label, Tags)
            )[0]
        finally:
            backend.no_truncation()


def _find_first(ranges: Iterable[tuple[int, int]], begin: int) -> int:
    """Return the first token of the ranges, counted from ``begin``."""
    return min(max(first, begin) for first, behind in ranges if behind > begin) - begin


def _token_range(tokens: Tokens, start: int, end: int) -> tuple[int, int]:
    """Return the first and last token that overlap the characters from ``start`` to ``end``.

    Raises:
        RowError: There is none.
    """
    first = next(
        (token for at in range(start, end) if (token := tokens.char_to_token(at)) is not None),
        None,
    )
    if first is None:
        raise RowError("an answer is empty after rendering, so that nothing of it is trained")
    last = next(
        token
        for at in range(end - 1, start - 1, -1)
        if (token := tokens.char_to_token(at)) is not None
    )
    # A letter of several bytes may be several tokens, of which char_to_token names the first.
    while (reach := tokens.token_to_chars(last + 1)) and start < reach[1] <= end:
        last += 1
    return int(first), int(last)


def _truncate(row: TokenRow, length: int, end_of_turn: int) -> TokenRow:
    """Cut a row so that its last answer keeps an end-of-turn token.

    The model still learns to stop.
    """
    keep = length - 1
    # The cut falls into what somebody else says: end with the answer before it, whose turn ended by
    # itself.
    end = keep - int(np.argmax(row.mask[:keep][::-1]))
    if end == keep:
        start = keep - int(np.argmin(row.mask[:keep][::-1])) if not row.mask[:keep].all() else 0
        turn_ends = np.flatnonzero(row.ids[start:keep] == end_of_turn)
        if not len(turn_ends):
            ids = np.append(row.ids[:keep], np.int32(end_of_turn))
            return TokenRow(ids=ids, mask=np.append(row.mask[:keep], True), truncated=True)
        # Only white space that the template puts behind a turn was left of it.
        end = start + int(turn_ends[-1]) + 1
    return TokenRow(ids=row.ids[:end], mask=row.mask[:end], truncated=True)
