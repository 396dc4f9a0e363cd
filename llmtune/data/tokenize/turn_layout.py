"""Make the texts of rows without rendering, which halves their time beside tokenizing.

Where a template writes contents unchanged, the text around them depends on who speaks in which
order alone, and is learned once for each order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.tokenize.span import Span
from llmtune.data.tokenize.static_template import Verbatim


@dataclass(frozen=True, slots=True)
class TurnLayout:
    """The text that a template puts around the messages of a sequence of roles."""

    between: tuple[str, ...]
    """Texts before the first message, between two, and behind the last."""
    reaches: tuple[tuple[int, int] | None, ...]
    """Letters before and behind an answer's words that its span includes; None for other turns."""


class TurnLayouts:
    """The layouts of one template, by the roles of a conversation."""

    def __init__(self, verbatim: Verbatim, learn: Callable[[tuple[Role, ...]], TurnLayout | None]):
        """
        Args:
            verbatim: How contents reach the template's text.
            learn: Finds the layout of a sequence of roles, None where there is none.
        """
        self._verbatim = verbatim
        self._learn = learn
        self._known: dict[tuple[Role, ...], TurnLayout | None] = {}

    def render(self, conversation: Conversation) -> tuple[str, list[Span]] | None:
        """Return the text of a row and the spans of its answers.

        None means that the template has to render the row.
        """
        # Rows of which the template may look at more than roles.
        messages = conversation.messages
        if (
            self._verbatim is Verbatim.no
            or conversation.tools
            or any(message.extra for message in messages)
        ):
            return None
        if self._verbatim is Verbatim.trimmed and any(
            not m.content or m.content[0].isspace() or m.content[-1].isspace() for m in messages
        ):
            return None

        # The layout, learned with the first row of these roles.
        roles = tuple(message.role for message in messages)
        if roles not in self._known:
            self._known[roles] = self._learn(roles)
        layout = self._known[roles]
        if layout is None:
            return None

        # The contents within it.
        parts = [layout.between[0]]
        position = len(parts[0])
        spans = []
        for message, following, reach in zip(
            messages, layout.between[1:], layout.reaches, strict=True
        ):
            end = position + len(message.content)
            if reach is not None:
                spans.append(Span(position - reach[0], end + reach[1], message.trained))
            parts += (message.content, following)
            position = end + len(following)
        return "".join(parts), spans


def make_sample(roles: Sequence[Role]) -> Conversation:
    """Make a conversation of these roles, with a made-up word for each message."""
    messages = (Message(role=role, content=_word(index)) for index, role in enumerate(roles))
    return Conversation(messages=tuple(messages))


def find_layout(sample: Conversation, text: str, answers: Sequence[Span]) -> TurnLayout | None:
    """Read the layout of a sample's roles.

    It is None where the words of the sample are not written once each, in order.

    Args:
        text: The sample, rendered.
        answers: The spans of its answers.
    """
    spans = iter(answers)
    between, reaches, position = [], [], 0
    for index, message in enumerate(sample.messages):
        word = _word(index)
        start = text.find(word, position)
        if start < 0:
            return None
        between.append(text[position:start])
        position = start + len(word)
        span = next(spans) if message.role is Role.assistant else None
        reaches.append((start - span.start, span.end - position) if span else None)
    between.append(text[position:])
    if any("\ue000" in part for part in between):
        # Words that are written more than once.
        return None
    return TurnLayout(tuple(between), tuple(reaches))


def _word(index: int) -> str:
    # Letters of Unicode's private use area, which no template has.
    return f"\ue000{index}\ue001"
