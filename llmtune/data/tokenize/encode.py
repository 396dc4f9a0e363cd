"""Conversations become token ids with a mask of what is trained.

The mask is decided by position in the rendered text, never by token id: so the padding token may be
the end-of-turn token without harm.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.config.groups.data import DataConfig, Overlong
from llmtune.data.rows.conversation import Conversation, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import texts_within
from llmtune.data.tokenize.chat_template import ChatTemplates, Span
from llmtune.data.tokenize.windows import WINDOW, LongEncoding, Pulse, WindowTokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row: shapes (length,)."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """Whether each token is trained."""
    truncated: bool = False
    label: str | int | float | None = None

    @property
    def trained_tokens(self) -> int:
        """The first token has nothing before it to be predicted from."""
        return int(np.count_nonzero(self.mask[1:]))


@dataclass(frozen=True, slots=True)
class Overflow:
    """A row that is longer than ``max_seq_length`` and was left out."""

    tokens: int
    """0 of a long text that was not tokenized to its end."""


#: Letters that are tokenized together: an encoding takes some 200 bytes for each.
BATCH_LETTERS = 1 << 20

_ALLOW = "If it is meant as one, take data.allow_special_tokens=true"

Outcome = list[TokenRow] | Overflow | RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings:
    """What shapes a row beside the tokenizer."""

    max_seq_length: int
    overlong: Overlong
    train_on_inputs: bool
    allow_special_tokens: bool = False

    @classmethod
    def from_config(cls, config: DataConfig) -> EncodeSettings:
        """The slice of the configuration."""
        return cls(
            max_seq_length=config.max_seq_length,
            overlong=config.overlong,
            train_on_inputs=config.train_on_inputs,
            allow_special_tokens=config.allow_special_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendered:
    """What goes to the tokenizer."""

    number: int
    conversation: Conversation
    text: Any
    """A text, or the pair of a classification row."""
    spans: list[Span]

    @property
    def letters(self) -> int:
        """Of both texts of a pair."""
        return sum(map(len, self.text)) if isinstance(self.text, tuple) else len(self.text)


class Encoder:
    """Encodes batches of conversations, of whatever format each is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: EncodeSettings):
        known: Any = tokenizer
        self.settings = settings
        self.tokenizer = tokenizer
        self._backend = known.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._windows = WindowTokenizer(self._backend)
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {
            index for index, token in added.items() if token.special
        }
        #: Tokens that may end a turn; some tokenizers do not call theirs special.
        self._ends = self.special | set(added)
        texts = sorted(
            {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self.special))},
            reverse=True,
        )
        self._special_text = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    @cached_property
    def _template(self) -> ChatTemplates | None:
        # Plain texts need none, and a tokenizer may have one that is broken.
        every_answer = self.settings.train_on_inputs
        return ChatTemplates(self.tokenizer, every_answer) if self.tokenizer.chat_template else None

    def encode(
        self, conversations: Sequence[Conversation], pulse: Pulse | None = None
    ) -> list[Outcome]:
        """The rows of each conversation, or why there are none.

        Args:
            pulse: Called now and then while a long one is tokenized.
        """
        outcomes: list[Any] = [None] * len(conversations)
        rendered: dict[bool, list[_Rendered]] = {True: [], False: []}
        for number, conversation in enumerate(conversations):
            try:
                self._check_special(conversation)
                self._check_switches(conversation)
                text, spans = self._render(conversation)
                rendered[conversation.plain].append(
                    _Rendered(number=number, conversation=conversation, text=text, spans=spans)
                )
            except RowError as error:
                outcomes[number] = error
        for plain, entries in rendered.items():
            for row, encoding in self._tokenize(entries, plain, pulse):
                try:
                    outcomes[row.number] = self._finish(
                        row.conversation, row.text, row.spans, encoding
                    )
                except RowError as error:
                    outcomes[row.number] = error
        return outcomes

    def _tokenize(
        self, rows: list[_Rendered], plain: bool, pulse: Pulse | None
    ) -> Iterator[tuple[_Rendered, Any]]:
        """Each row with its encoding; None of one that is too long, and not to be cut."""
        done = 0

        def pulse_on(tokens: int) -> None:
            if pulse is not None:
                pulse(done + tokens)

        for batch in _batches(rows):
            if batch[0].letters <= WINDOW:
                texts = [row.text for row in batch]
                encodings = self._backend.encode_batch(texts, add_special_tokens=plain)
                yield from zip(batch, encodings, strict=True)
                done += sum(map(len, encodings))
                continue
            row = batch[0]
            if row.conversation.label is None:
                row, encoding = self._tokenize_long(row, plain, pulse_on)
            else:
                row, encoding = self._tokenize_long_texts(row, plain, pulse_on)
            yield row, encoding
            done += len(encoding) if encoding is not None else 0

    def _tokenize_long(self, row: _Rendered, plain: bool, pulse: Pulse) -> tuple[_Rendered, Any]:
        limit, overlong = self.settings.max_seq_length, self.settings.overlong
        # What stands behind the last trained letter does not count.
        end = max((span.end for span in row.spans if span.train), default=0)
        # All of a text may be cut anywhere; a chat's last token says how turns end.
        cuts = overlong is Overlong.truncate and plain and len(row.conversation.messages) == 1

        def enough(tokens: int, letters: int) -> bool:
            return (cuts or overlong is Overlong.drop) and tokens > limit and letters < end

        encoding = self._windows.encode(row.text, plain, enough, pulse)
        if encoding.letters == len(row.text):
            return row, encoding
        if not cuts:
            return row, None
        return (
            replace(
                row, text=row.text[: encoding.letters], spans=[Span(0, encoding.letters, True)]
            ),
            encoding,
        )

    def _tokenize_long_texts(
        self, row: _Rendered, plain: bool, pulse: Pulse
    ) -> tuple[_Rendered, Any]:
        """A classification row, cut to letters of which there are surely too many tokens."""

        def enough(tokens: int, _letters: int) -> bool:
            return tokens > self.settings.max_seq_length

        texts = row.text if isinstance(row.text, tuple) else (row.text,)
        # A window more, so that the letters at the cut, whose tokens may be others, are cut off by
        # the tokens as well.
        cut = tuple(
            text[: self._windows.encode(text, False, enough, pulse).letters + WINDOW]
            for text in texts
        )
        if cut != texts and self.settings.overlong is not Overlong.truncate:
            return row, None
        row = replace(row, text=cut if isinstance(row.text, tuple) else cut[0])
        return row, self._backend.encode_batch([row.text], add_special_tokens=plain)[0]

    def _render(self, conversation: Conversation) -> tuple[Any, list[Span]]:
        """What goes to the tokenizer: a text, or the pair of a classification row; and the trained
        spans of it.
        """
        texts = [message.content for message in conversation.messages]
        if conversation.label is not None:
            return (texts[0] if len(texts) == 1 else tuple(texts)), []
        if conversation.plain:
            text = "".join(texts)
            return text, [Span(len(text) - len(texts[-1]), len(text), True)]
        if self._template is None:
            raise RowError("the tokenizer has no chat template; name one with data.chat_template")
        return self._template.render(conversation)

    def _check_special(self, conversation: Conversation) -> None:
        if self._special_text is None or self.settings.allow_special_tokens:
            return
        for number, message in enumerate(conversation.messages):
            found = self._special_text.search(message.content)
            for text in texts_within(message.extra) if message.extra else ():
                found = found or self._special_text.search(text)
            if found:
                raise RowError(
                    f"the text of message {number} ({message.role.value}) holds {found[0]!r}, which"
                    " the tokenizer reads as a special token: has it been through a chat template"
                    f" already? {_ALLOW}"
                )
        for text in texts_within(list(conversation.tools)) if conversation.tools else ():
            if found := self._special_text.search(text):
                raise RowError(
                    f"'tools' holds {found[0]!r}, which the tokenizer reads as a special token."
                    f" {_ALLOW}"
                )

    def _check_switches(self, conversation: Conversation) -> None:
        for number, message in enumerate(conversation.messages):
            if message.role is Role.assistant or message.train in (
                None,
                self.settings.train_on_inputs,
            ):
                continue
            said, now = (
                ("to be trained", "false") if message.train else ("not to be trained", "true")
            )
            raise RowError(
                f"message {number} ({message.role.value}) says that it is {said}, and"
                f" data.train_on_inputs={now} decides for all that is not the assistant's; take the"
                f" field out, or data.train_on_inputs={str(message.train).lower()}"
            )

    def _finish(
        self, conversation: Conversation, text: Any, spans: list[Span], encoding: Any
    ) -> Outcome:
        if encoding is None:
            if self.settings.overlong is Overlong.drop:
                return Overflow(0)
            raise RowError(
                f"the row has more tokens than data.max_seq_length={self.settings.max_seq_length}"
            )
        ids = np.asarray(encoding.ids, dtype=np.int32)
        if conversation.label is not None:
            return self._finish_classification(conversation, text, ids)
        if conversation.plain:
            ids = self._end_text(ids, encoding)
        mask = np.zeros(len(ids), dtype=bool)
        silent = np.zeros(len(ids) if self.settings.train_on_inputs else 0, dtype=bool)
        end_of_turn = self._eos
        for start, end, train in spans:
            first, last = _token_range(encoding, start, end)
            (mask if train else silent)[first : last + 1] = True
            if train and not conversation.plain:
                end_of_turn = self._find_end_token(text, end, last, encoding)
        if len(ids) > 1 and self._bos is not None and ids[0] == ids[1] == self._bos:
            if not (conversation.plain and self.settings.allow_special_tokens):
                raise RowError("begins with two BOS tokens; take another data.chat_template")
            # The text brings its own, and the tokenizer puts one before it.
            ids, mask, silent = ids[1:], mask[1:], silent[1:]
        if conversation.plain:
            mask[-1] = True
        if not mask[1:].any():
            spoken = any(message.role is Role.assistant for message in conversation.messages)
            raise RowError(
                "no token is trained" + ("" if spoken else ": there is no answer of the assistant")
            )
        # Nothing behind the last trained token can matter.
        end = len(mask) - int(np.argmax(mask[::-1]))
        row = TokenRow(ids=ids[:end], mask=mask[:end])
        rows = self._fit(row, end_of_turn, whole_text=len(conversation.messages) == 1)
        if self.settings.train_on_inputs and isinstance(rows, list):
            return [replace(cut, mask=_all_but(silent, len(cut.ids))) for cut in rows]
        return rows

    def _end_text(self, ids: NDArray[np.int32], encoding: Any) -> NDArray[np.int32]:
        """Plain text ends with the end-of-text token, whether or not the tokenizer put it there."""
        if self._eos is None:
            raise RowError("the tokenizer has no end-of-text token to end a text with")
        if len(ids) and ids[-1] == self._eos:
            return ids
        # Others, such as BERT's [SEP], stay where they are. A long text has room for one more; all
        # of it is not copied.
        return (
            encoding.ids_and(self._eos)
            if isinstance(encoding, LongEncoding)
            else np.append(ids, np.int32(self._eos))
        )

    def _find_end_token(self, text: str, end: int, last: int, encoding: Any) -> int:
        """The last trained token of an answer, white space aside, which must be one that ends a
        turn.
        """
        if text[end - 1].isspace():
            bare = len(text[:end].rstrip())
            last = _token_range(encoding, bare - 1, bare)[1]
        if encoding.ids[last] not in self._ends:
            token = self.tokenizer.decode([encoding.ids[last]])
            raise RowError(
                "the chat template does not end a trained answer with a special token (the last"
                f" one is {token!r}), so the model would never learn to stop; take another"
                " data.chat_template"
            )
        return int(encoding.ids[last])

    def _fit(self, row: TokenRow, end_of_turn: int, whole_text: bool) -> Outcome:
        """The row within ``max_seq_length``, or what the setting makes of a longer one."""
        limit, length = self.settings.max_seq_length, len(row.ids)
        if length <= limit:
            return [row]
        if self.settings.overlong is Overlong.drop:
            return Overflow(length)
        if self.settings.overlong is Overlong.split and whole_text:
            # No piece of one token: nothing of it could be trained.
            first_piece = limit - 1 if length % limit == 1 else limit
            borders = [0, *range(first_piece, length, limit), length]
            return [
                TokenRow(ids=row.ids[a:b], mask=row.mask[a:b])
                for a, b in itertools.pairwise(borders)
            ]
        first = int(np.argmax(row.mask))
        if self.settings.overlong is Overlong.truncate and first < limit - 1:
            return [_truncate(row, limit, end_of_turn)]
        if first >= limit - 1:
            raise RowError(
                f"the prompt alone has {first} tokens, which leaves no room for an answer within"
                f" data.max_seq_length={limit}; shorten the row, or take"
                f" data.max_seq_length={length}"
            )
        raise RowError(
            f"the row has {length} tokens, more than data.max_seq_length={limit}; take"
            " data.overlong=drop or truncate, or a larger data.max_seq_length"
        )

    def _finish_classification(
        self, conversation: Conversation, text: Any, ids: NDArray[np.int32]
    ) -> Outcome:
        limit = self.settings.max_seq_length
        truncated = len(ids) > limit
        if truncated:
            if self.settings.overlong is Overlong.drop:
                return Overflow(len(ids))
            if self.settings.overlong is not Overlong.truncate:
                raise RowError(
                    f"the row has {len(ids)} tokens, more than data.max_seq_length={limit}"
                )
            pair = text if isinstance(text, tuple) else (text, None)
            cut: Any = self.tokenizer(*pair, truncation=True, max_length=limit)
            ids = np.asarray(cut["input_ids"], dtype=np.int32)
            self._backend.no_truncation()
        return [
            TokenRow(
                ids=ids,
                mask=np.zeros(len(ids), dtype=bool),
                truncated=truncated,
                label=conversation.label,
            )
        ]


def _batches(rows: list[_Rendered]) -> Iterator[list[_Rendered]]:
    """Rows that are tokenized together, of at most ``BATCH_LETTERS``; long ones alone."""
    batch: list[_Rendered] = []
    letters = 0
    for row in rows:
        if batch and (row.letters > WINDOW or letters + row.letters > BATCH_LETTERS):
            yield batch
            batch, letters = [], 0
        if row.letters > WINDOW:
            yield [row]
            continue
        batch.append(row)
        letters += row.letters
    if batch:
        yield batch


def _all_but(silent: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """The mask of a row of which all is trained but what messages forbid.

    A row that was cut begins as the whole one did.
    """
    mask = np.ones(length, dtype=bool)
    known = silent[:length]
    mask[: len(known)] = ~known
    return mask


def _token_range(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """First and last token that lie in, or reach into, the characters from ``start`` to ``end``.

    Raises:
        RowError: There is none.
    """
    first = next(
        (token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None),
        None,
    )
    if first is None:
        raise RowError("an answer is empty after rendering, so that nothing of it is trained")
    last = next(
        token
        for at in range(end - 1, start - 1, -1)
        if (token := encoding.char_to_token(at)) is not None
    )
    # A letter of several bytes may be several tokens, of which char_to_token names the first.
    while (
        last + 1 < len(encoding)
        and (reach := encoding.token_to_chars(last + 1))
        and start < reach[1] <= end
    ):
        last += 1
    return int(first), int(last)


def _truncate(row: TokenRow, length: int, end_of_turn: int) -> TokenRow:
    """Cut a row; its last answer keeps an end-of-turn token, so that the model still learns to
    stop.
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
