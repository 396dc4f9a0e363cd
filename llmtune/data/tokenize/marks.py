"""Assign a template's marks (``{% generation %}``) to the messages that they are around.

Marks may be wrong: around what somebody else says, or around a part of an answer, such as its words
and not its calls. So rows of each shape are rendered once with a made-up word in every place, and
it is checked which of the words are marked.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from llmtune.data.rows.conversation import Conversation, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.pieces import TAG, Piece, Walk
from llmtune.template_errors import TEMPLATE_ERRORS

#: Shapes of rows that are remembered.
_REMEMBERED = 4096

_COPY = (
    "mark it right in a copy of the template (data.chat_template=FILE.jinja), or take one without"
    " marks"
)

Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Owners:
    """The owners of the marks in rows of one shape."""

    messages: tuple[int, ...]
    """The number of the message that each mark belongs to."""
    problem: str | None = None


class Marks:
    """The marks of one template."""

    def __init__(self, render: Callable[[Conversation], tuple[str, Ranges]]):
        """Args:
        render: The template; returns the text and the marked ranges, from the first letter to the
                one behind the last.
        """
        self._render = render
        self._known: dict[Hashable, _Owners | None] = {}

    def owners(self, conversation: Conversation, count: int) -> list[int]:
        """Return the number of the message that each of the row's marks belongs to.

        Args:
            count: Of the row's marks.

        Raises:
            RowError: An answer that is to be trained is not marked, or what somebody else says is;
                or it cannot be told.
        """
        # The row with made-up words, and the speaker of each.
        walk = Walk(disguise=True)
        speakers: list[int] = []
        messages = []
        for index, message in enumerate(conversation.messages):
            messages.append(walk.message(index, message))
            speakers += [index] * (len(walk.pieces) - len(speakers))

        # Rows of one shape have the same owners, which are found once.
        shape = (len(conversation.tools), *walk.shape)
        if shape not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[shape] = self._find(
                replace(conversation, messages=tuple(messages)), walk.pieces, speakers
            )
        found = self._known[shape]
        if found is not None and found.problem:
            raise RowError(found.problem)
        if found is not None and len(found.messages) == count:
            return list(found.messages)
        # The template looks at the words, and does something else with made-up ones.
        answers = [
            index for index, m in enumerate(conversation.messages) if m.role is Role.assistant
        ]
        if len(answers) != count:
            raise RowError(
                f"the chat template marks {count} places for {len(answers)} answers, and it cannot"
                f" be told whose they are; {_COPY}"
            )
        return answers

    def _find(
        self, disguised: Conversation, pieces: list[Piece], speakers: list[int]
    ) -> _Owners | None:
        """Find the owners for rows of a shape; None where the template refuses made-up words."""
        try:
            text, marks = self._render(disguised)
        except TEMPLATE_ERRORS:
            return None

        # Look for the word of each piece in the marked ranges.
        owners: list[int | None] = [None] * len(marks)
        for piece, speaker in zip(pieces, speakers, strict=True):
            message = disguised.messages[speaker]
            word = str(piece.value)
            if isinstance(piece.value, bool) or TAG.fullmatch(word) or word not in text:
                continue
            inside = [index for index, (start, end) in enumerate(marks) if word in text[start:end]]

            # Marks around others' words are refused, and answers without a mark.
            if inside and message.role is not Role.assistant:
                return _Owners(
                    (), f"the chat template marks {piece.where} as the assistant's; {_COPY}"
                )
            if not inside and message.trained and message.role is Role.assistant:
                return _Owners(
                    (),
                    f"the chat template does not mark {piece.where} as the assistant's, so it would"
                    f" not be trained; {_COPY}, or set 'train' of the message to false",
                )

            # A mark around several messages must treat them alike.
            for index in inside:
                if owners[index] not in (None, speaker) and message.trained != _trained(
                    disguised, owners[index]
                ):
                    return _Owners(
                        (),
                        "the chat template puts one mark around several answers, up to"
                        f" {piece.where}; {_COPY}",
                    )
                owners[index] = speaker
        return _Owners(tuple(_filled(owners)))


def _trained(conversation: Conversation, index: int | None) -> bool:
    return index is not None and conversation.messages[index].trained


def _filled(owners: list[int | None]) -> list[int]:
    """Give marks around no words, such as the end of a turn, to the answer before them."""
    filled: list[int] = []
    following = next((one for one in owners if one is not None), 0)
    for one in owners:
        following = following if one is None else one
        filled.append(following)
    return filled
