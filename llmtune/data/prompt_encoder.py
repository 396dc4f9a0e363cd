"""Encode what a language model is to answer or to continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.chat_template import ChatTemplates, check_chat_template
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import TokenRow
from llmtune.data.tokenize.workers import make_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptEncoder:
    """Encodes conversations up to the beginning of an answer, and plain texts to their end.

    They have the tokens that they have in training.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncodeSettings,
        most_tokens: int | None = None,
    ):
        """
        Args:
            most_tokens: Of a prompt that leaves room for an answer; None without a limit.
        """
        known: Any = tokenizer
        self._tokenizer = tokenizer
        self._backend = known.backend_tokenizer
        self._check_special = make_encoder(tokenizer, settings).check_special
        self._most_tokens = most_tokens

    @cached_property
    def _templates(self) -> ChatTemplates:
        # Plain texts need none.
        check_chat_template(self._tokenizer, self._tokenizer.name_or_path)
        return ChatTemplates(self._tokenizer)

    def encode(self, conversations: Sequence[Conversation]) -> list[TokenRow | RowError]:
        """The tokens of each prompt, or why there are none.

        Raises:
            ConfigError: A chat template is needed, and there is none that works.
        """
        outcomes: list[TokenRow | RowError] = []
        for conversation in conversations:
            try:
                self._check_special(conversation)
                outcomes.append(self._encode(conversation))
            except RowError as error:
                outcomes.append(RowError(str(error)))
        return outcomes

    def _encode(self, conversation: Conversation) -> TokenRow:
        if conversation.plain:
            text = "".join(message.content for message in conversation.messages)
            encoding = self._backend.encode(text, add_special_tokens=True)
            ids = encoding.ids
            # What the tokenizer puts behind a text would end it.
            while ids and encoding.special_tokens_mask[len(ids) - 1]:
                ids = ids[:-1]
        else:
            ids = self._backend.encode(self._render(conversation), add_special_tokens=False).ids
        if not ids:
            raise RowError("the tokenizer has no token for the text")
        if self._most_tokens is not None and len(ids) > self._most_tokens:
            raise RowError(
                f"the prompt has {len(ids)} tokens, and {self._most_tokens} leave room for an"
                " answer of predict.max_new_tokens within the positions of the model; shorten it"
            )
        row = np.array(ids, dtype=np.int32)
        return TokenRow(ids=row, mask=np.zeros(len(row), dtype=bool))

    def _render(self, conversation: Conversation) -> str:
        answer = Message(role=Role.assistant, content="")
        whole = replace(conversation, messages=(*conversation.messages, answer))
        return self._templates.render_prompt(whole)
