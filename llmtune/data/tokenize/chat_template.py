"""Load chat templates, and render conversations by them with the spans of the answers.

Where a template marks what the assistant says (``{% generation %}``), the marks decide. Elsewhere
the places are derived: the template is rendered up to each answer and with it, and what the answer
added is the answer and its end of turn; the pieces must add up to the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.speakers import Speakers
from llmtune.data.tokenize.completeness import Completeness
from llmtune.data.tokenize.marks import Marks
from llmtune.data.tokenize.span import Span
from llmtune.data.tokenize.static_template import Verbatim, find_verbatim
from llmtune.data.tokenize.thinking import explain_difference
from llmtune.data.tokenize.turn_layout import TurnLayout, TurnLayouts, find_layout, make_sample
from llmtune.errors import ConfigError
from llmtune.template_bounds import bounded_template, refuse_powers
from llmtune.template_errors import TEMPLATE_ERRORS, describe_template_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def load_chat_template(name: str | None) -> str | None:
    """Load the text of a named template of ``conf/chat_template/`` or of a ``.jinja`` file.

    Raises:
        ConfigError: Neither exists, or the file is empty or no Jinja.
    """
    if name is None:
        return None
    folder = Path(str(resources.files("llmtune.conf"))) / "chat_template"
    path = Path(name).expanduser() if name.endswith(".jinja") else folder / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
        raise ConfigError(
            f"data.chat_template={name}: no such template; there are {known}, or the path of a"
            " .jinja file"
        )
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ConfigError(f"data.chat_template={name}: the file is empty")
    return text


def check_chat_template(tokenizer: PreTrainedTokenizerBase, model_name: str) -> None:
    """Refuse a tokenizer without a template.

    With a guessed template, other tools would prompt the model wrongly.

    Raises:
        ConfigError: There is no template, it is no Jinja, or there are several and none is named
            ``default``.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and named and "default" not in named:
        raise ConfigError(
            f"the tokenizer of {model_name} has the chat templates {', '.join(sorted(named))}, and"
            " none named default: save the one that is meant to a file, and name it with"
            " data.chat_template=FILE.jinja"
        )
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {model_name} has no chat template (a base model?): add"
            " data.chat_template=llama3, llama2, chatml, mistral, qwen, or a .jinja file"
        )
    try:
        ChatTemplates(tokenizer)
    except TEMPLATE_ERRORS as error:
        raise ConfigError(
            f"the chat template of {model_name}, or data.chat_template, is no Jinja:"
            f" {describe_template_error(error)}; fix it, or name another with data.chat_template"
        ) from error


class ChatTemplates:
    """The templates of a tokenizer.

    One named ``tool_use`` is for rows with tools, as transformers has it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, every_answer: bool = False):
        """Args:
        every_answer: Also find the spans of answers that are not trained, so that all
                else can be trained.
        """
        named: Any = tokenizer.chat_template
        self._default = ChatTemplate(tokenizer, every_answer=every_answer)
        self._tool_use = self._default
        if isinstance(named, dict) and "tool_use" in named:
            self._tool_use = ChatTemplate(tokenizer, named["tool_use"], every_answer)

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Render a row with the template that it needs; see :meth:`ChatTemplate.render`."""
        return self._of(conversation).render(conversation)

    def render_prompt(self, conversation: Conversation) -> str:
        """Render the text up to the last answer, with what precedes an answer.

        Raises:
            RowError: The template refuses it.
        """
        return self._of(conversation).render_prompt(conversation)

    def _of(self, conversation: Conversation) -> ChatTemplate:
        return self._tool_use if conversation.uses_tools else self._default


class ChatRenderer:
    """Renders chats by a tokenizer's templates, which are read when the first chat comes.

    Plain texts need none, and a tokenizer may have one that is broken.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, every_answer: bool):
        self._tokenizer, self._every_answer = tokenizer, every_answer

    @cached_property
    def _templates(self) -> ChatTemplates:
        return ChatTemplates(self._tokenizer, self._every_answer)

    def __call__(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Text and spans of a row; see :meth:`ChatTemplate.render`.

        Raises:
            RowError: There is no template, or :meth:`ChatTemplate.render` raises it.
        """
        if not self._tokenizer.chat_template:
            raise RowError("the tokenizer has no chat template; name one with data.chat_template")
        return self._templates.render(conversation)


class ChatTemplate:
    """One template, ready to render many conversations."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | None = None,
        every_answer: bool = False,
    ):
        """
        Args:
            text: Of the template; the tokenizer's own where it is not given.
            every_answer: As :class:`ChatTemplates` has it.
        """
        self._every_answer = every_answer
        # Here, because it imports torch, which commands without data do not need.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._text = text if text is not None else str(tokenizer.get_chat_template())
        self._variables = dict(tokenizer.special_tokens_map)
        self._closing = str(tokenizer.eos_token or "")
        self._completeness = Completeness(lambda row: self._apply(row.messages, row)[0])
        self._speakers = Speakers(lambda row: self._apply(row.messages, row)[0])
        self._marks = Marks(lambda row: self._apply(row.messages, row, marks=True))
        self.marked = _MARK.search(self._text) is not None
        refuse_powers(self._text)
        with bounded_template():
            environment: Any = _compile_jinja_template(self._text).environment
        verbatim = Verbatim.no if self.marked else find_verbatim(environment.parse(self._text))
        self._layouts = TurnLayouts(verbatim, self._learn_layout)

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the whole text, and the spans of the answers with what ends their turns, in order.

        Raises:
            RowError: The template refuses the row, answers cannot be told from what surrounds them,
                or the text lacks something that the row says.
        """
        built = self._layouts.render(conversation)
        if built is not None:
            # Every word of it is there by construction.
            return built
        try:
            text, spans = self._marked(conversation) if self.marked else self._derived(conversation)
            self._completeness.check(conversation, text)
            self._speakers.check(conversation, text)
            return text, spans
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from error

    def render_prompt(self, conversation: Conversation) -> str:
        """Render the text up to the last answer, with what precedes an answer.

        Raises:
            RowError: The template refuses it.
        """
        try:
            return self._apply(conversation.messages[:-1], conversation, prompt=True)[0]
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from error

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        text, marks = self._apply(conversation.messages, conversation, marks=True)
        owners = self._marks.owners(conversation, len(marks))
        trained = [conversation.messages[number].trained for number in owners]
        return text, [Span(*mark, train) for mark, train in zip(marks, trained, strict=True)]

    def _derived(self, conversation: Conversation) -> tuple[str, list[Span]]:
        text, _ = self._apply(conversation.messages, conversation)
        return text, self._by_prefixes(conversation, text)

    def _by_prefixes(self, conversation: Conversation, text: str) -> list[Span]:
        """Render up to each answer, and with it.

        Untrained ones whose spans cannot be told are left out.
        """
        messages = conversation.messages
        spans = []
        for index, message in enumerate(conversation.messages):
            if message.role is not Role.assistant:
                continue

            # The text up to the answer, and up to the end of its turn.
            prefix, _ = self._apply(messages[:index], conversation, prompt=True)
            whole = text
            if index < len(messages) - 1:
                whole, _ = self._apply(messages[: index + 1], conversation)
            upto = self._without_closing(whole.rstrip(), prefix, text)

            # Both must be beginnings of the whole text.
            if not (upto.startswith(prefix) and text.startswith(upto)):
                if not message.trained and not self._every_answer:
                    continue
                raise RowError(
                    explain_difference(f"message {index}", prefix, upto, text)
                    or f"the chat template renders the answer in message {index} differently with"
                    " and without what surrounds it, so its tokens cannot be told apart; take another"  # noqa: E501
                    " data.chat_template"
                )
            spans.append(Span(len(prefix), len(upto), message.trained))
        return spans

    def _without_closing(self, upto: str, prefix: str, text: str) -> str:
        """Render up to an answer, without the end-of-text token of templates such as Phi-3's.

        They put it behind the last message, whoever speaks.
        """
        if text.startswith(upto) or not self._closing or not upto.endswith(self._closing):
            return upto
        shorter = upto.removesuffix(self._closing).rstrip()
        return shorter if text.startswith(shorter) and len(shorter) > len(prefix) else upto

    def _learn_layout(self, roles: tuple[Role, ...]) -> TurnLayout | None:
        """Learn the layout of a sequence of roles from a sample with made-up words.

        It is None where words are written more than once, or the template refuses the sample.
        """
        sample = make_sample(roles)
        try:
            text, _ = self._apply(sample.messages, sample)
            spans = self._by_prefixes(sample, text)
            self._speakers.check(sample, text)
        except (RowError, *TEMPLATE_ERRORS):
            # Any error is found again, and reported, with the row itself.
            return None
        return find_layout(sample, text, spans)

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Tell whether the template takes the arguments of a call as JSON text.

        Most take a mapping, and write JSON or more.

        One that wants text cannot join a mapping to it, or writes the mapping as Python does.
        """
        # A conversation with one call, whose arguments are easy to find in the text.
        call = {
            "id": "callcall0",
            "type": "function",
            "function": {"name": "f", "arguments": {"zqkey": "zqvalue"}},
        }
        answer = Message(role=Role.assistant, content="", extra={"tool_calls": [call]})
        result = Message(
            role=Role.tool, content="c", extra={"tool_call_id": "callcall0", "name": "f"}
        )
        messages = (
            Message(role=Role.user, content="a"),
            answer,
            result,
            Message(role=Role.assistant, content="d"),
        )
        sample = Conversation(
            messages=messages,
            tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
        )

        # Render it with the arguments as a mapping, and as JSON text.
        written: dict[bool, str | None] = {}
        for as_text in (False, True):
            try:
                written[as_text] = self._apply(messages, sample, as_text=as_text)[0]
            except TEMPLATE_ERRORS:
                written[as_text] = None
        as_mapping = written[False]
        return written[True] is not None and (
            as_mapping is None or "{'zqkey': 'zqvalue'}" in as_mapping
        )

    def _to_dict(self, message: Message, as_text: bool | None) -> dict[str, Any]:
        """Convert a message to what the template reads."""
        values = message.to_dict()
        if "tool_calls" in values and (self._arguments_as_text if as_text is None else as_text):
            values["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **function,
                        "arguments": json.dumps(function["arguments"], ensure_ascii=False),
                    },
                }
                for call in values["tool_calls"]
                for function in [call["function"]]
            ]
        return values

    def _apply(
        self,
        messages: Sequence[Message],
        conversation: Conversation,
        prompt: bool = False,
        marks: bool = False,
        as_text: bool | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render some messages of a conversation.

        Args:
            prompt: Add what precedes an answer.
            marks: Also find the places that the template marks.
            as_text: True writes arguments of calls as JSON text; None follows the template.

        Raises:
            ConfigError: The template does not end.
        """
        # What tokenizer.apply_chat_template calls, without the tokenizer around it, which costs
        # half as much again. Its annotation says str for what is a list of texts and one of spans.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        values = [self._to_dict(message, as_text) for message in messages]
        with bounded_template():
            texts, spans = render(
                [values],
                tools=list(conversation.tools) or None,
                chat_template=self._text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        return texts[0], list(spans[0]) if marks else []


def _refused(error: Exception) -> RowError:
    return RowError(
        f"the chat template refuses the row: {describe_template_error(error)}; fix the row, or"
        " take another data.chat_template"
    )
