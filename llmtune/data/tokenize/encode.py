"""Encode conversations: check, render, tokenize, and fit into rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.data import Overlong
from llmtune.data.rows.conversation import Conversation, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import texts_within
from llmtune.data.tokenize.fit_row import RenderedRow, RowFitter
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.span import Span
from llmtune.data.tokenize.token_row import Outcome
from llmtune.data.tokenize.windows import WINDOW, Pulse, WindowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Renders a chat: its text, and the spans of the answers.
RenderChat = Callable[[Conversation], tuple[str, list[Span]]]

#: Letters that are tokenized together: an encoding takes some 200 bytes for each.
BATCH_LETTERS = 1 << 20

_ALLOW = "If it is meant as one, take data.allow_special_tokens=true"


class _Kind(Enum):
    """The way in which a row goes to the tokenizer."""

    plain = "plain"
    """A text or a pair, to which the tokenizer adds its special tokens."""
    chat = "chat"
    """A text with the special tokens of a chat template."""
    words = "words"
    """A list of words, to which the tokenizer adds its special tokens."""


class Encoder:
    """Encodes batches of conversations, of whatever format each is."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncodeSettings,
        render_chat: RenderChat,
        folder: Path | None = None,
    ):
        """
        Args:
            render_chat: Renders a chat, and finds the spans of its answers; raises RowError.
            folder: For the ids of texts of millions of tokens; None keeps them in memory.
        """
        known: Any = tokenizer
        self.settings = settings
        self.tokenizer = tokenizer
        self._render_chat = render_chat
        self._backend = known.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._windows = WindowTokenizer(self._backend, folder=folder)
        self._fitter = RowFitter(tokenizer, settings)
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {
            index for index, token in added.items() if token.special
        }
        texts = sorted(
            {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self.special))},
            reverse=True,
        )
        self._special_text = re.compile("|".join(map(re.escape, texts))) if texts else None

    @cached_property
    def _word_prefix(self) -> str:
        """A space, where the tokenizer would join words that are given one by one."""
        ids = self._backend.encode(["a", "b"], is_pretokenized=True, add_special_tokens=False).ids
        return "" if self._backend.decode(ids).strip() == "a b" else " "

    def encode(
        self, conversations: Iterable[Conversation], pulse: Pulse | None = None
    ) -> list[Outcome]:
        """Return the rows of each conversation, or the error about it.

        Args:
            conversations: Gone through once; none is held after it has been rendered.
            pulse: Called now and then while a long one is tokenized.
        """
        rendered: dict[_Kind, list[RenderedRow]] = {kind: [] for kind in _Kind}
        refused = self._render_all(conversations, rendered)
        outcomes: list[Any] = [None] * (len(refused) + sum(map(len, rendered.values())))
        for index, refusal in refused.items():
            outcomes[index] = refusal
        for kind, rows in rendered.items():
            for row, encoding in self._tokenize(rows, kind, pulse):
                try:
                    outcomes[row.index] = self._fitter.fit(row, encoding)
                except RowError as error:
                    outcomes[row.index] = RowError(str(error))
        return outcomes

    def _render_all(
        self, conversations: Iterable[Conversation], rendered: dict[_Kind, list[RenderedRow]]
    ) -> dict[int, Outcome]:
        """Render conversations into lists by kind; the errors of the others.

        The frame of this method is what holds the last conversation: it is gone when texts are
        tokenized.
        """
        refused: dict[int, Outcome] = {}
        for index, conversation in enumerate(conversations):
            try:
                self.check_special(conversation)
                self._check_switches(conversation)
                text, spans = self._render(conversation)
            except RowError as error:
                # Not the error itself: its traceback would hold the conversation.
                refused[index] = RowError(str(error))
                continue
            kind = _Kind.plain if conversation.plain else _Kind.chat
            if conversation.words:
                kind = _Kind.words
            rendered[kind].append(
                RenderedRow(
                    index=index,
                    text=text,
                    spans=spans,
                    plain=conversation.plain,
                    messages=len(conversation.messages),
                    has_answer=any(m.role is Role.assistant for m in conversation.messages),
                    label=conversation.label,
                )
            )
        return refused

    def _tokenize(
        self, rows: list[RenderedRow], kind: _Kind, pulse: Pulse | None
    ) -> Iterator[tuple[RenderedRow, Any]]:
        """Yield each row with its encoding; None for one that is too long and must not be cut."""
        done = 0

        def pulse_on(tokens: int) -> None:
            if pulse is not None:
                pulse(done + tokens)

        for batch in _batches(rows):
            if batch[0].letters <= WINDOW or kind is _Kind.words:
                encodings = self._backend.encode_batch(
                    [row.text for row in batch],
                    add_special_tokens=kind is not _Kind.chat,
                    is_pretokenized=kind is _Kind.words,
                )
                yield from zip(batch, encodings, strict=True)
                done += sum(map(len, encodings))
                continue

            # A long text comes alone, and is encoded in windows.
            row = batch[0]
            if isinstance(row.text, str) and row.label is None:
                row, encoding = self._tokenize_long(row, row.text, pulse_on)
            else:
                row, encoding = self._tokenize_long_texts(row, pulse_on)
            yield row, encoding
            done += len(encoding) if encoding is not None else 0

    def _tokenize_long(self, row: RenderedRow, text: str, pulse: Pulse) -> tuple[RenderedRow, Any]:
        limit, overlong = self.settings.max_seq_length, self.settings.overlong
        # Text behind the last trained letter does not count.
        end = max((span.end for span in row.spans if span.train), default=0)
        # All of a text may be cut anywhere; a chat's last token says how turns end.
        cuts = overlong is Overlong.truncate and row.plain and row.messages == 1

        def enough(tokens: int, letters: int) -> bool:
            return (cuts or overlong is Overlong.drop) and tokens > limit and letters < end

        encoding = self._windows.encode(text, row.plain, enough, pulse)
        if encoding.letters == len(text):
            return row, encoding
        if not cuts:
            return row, None
        spans = [Span(0, encoding.letters, True)]
        return replace(row, text=text[: encoding.letters], spans=spans), encoding

    def _tokenize_long_texts(self, row: RenderedRow, pulse: Pulse) -> tuple[RenderedRow, Any]:
        """A row with a label, cut to letters of which there are surely too many tokens."""

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
        return row, self._backend.encode_batch([row.text], add_special_tokens=row.plain)[0]

    def _render(self, conversation: Conversation) -> tuple[str | tuple[str, ...], list[Span]]:
        """Render the text, the pair or the words of a row; and the spans of answers."""
        if conversation.words:
            return tuple(self._word_prefix + word for word in conversation.words), []
        texts = [message.content for message in conversation.messages]
        if conversation.label is not None:
            return (texts[0] if len(texts) == 1 else tuple(texts)), []
        if conversation.plain:
            text = "".join(texts)
            return text, [Span(len(text) - len(texts[-1]), len(text), True)]
        return self._render_chat(conversation)

    def check_special(self, conversation: Conversation) -> None:
        """Refuse a text that the tokenizer reads as a special token, unless they are allowed.

        Raises:
            RowError: With the text.
        """
        if self._special_text is None or self.settings.allow_special_tokens:
            return
        for number, message in enumerate(conversation.messages):
            found = self._special_text.search(message.content)
            for text in texts_within(message.extra):
                found = found or self._special_text.search(text)
            if found:
                raise RowError(
                    f"the text of message {number} ({message.role.value}) holds {found[0]!r}, which"
                    " the tokenizer reads as a special token: has it been through a chat template"
                    f" already? {_ALLOW}"
                )
        for text in texts_within(conversation.tools):
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


def _batches(rows: list[RenderedRow]) -> Iterator[list[RenderedRow]]:
    """Yield rows that are tokenized together, at most ``BATCH_LETTERS``; long ones alone."""
    batch: list[RenderedRow] = []
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
