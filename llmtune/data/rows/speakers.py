"""Check that a template's text tells who says what, and which call a result answers.

Words alone do not say it. A template that knows no tools may write a result as the assistant's
answer, and one that leaves out the ids of calls says by their order alone which result is whose.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import is_blank
from llmtune.template_errors import TEMPLATE_ERRORS

#: Shapes of rows that are remembered.
_REMEMBERED = 4096

#: Fields of a result that say which call it answers.
_ADDRESS = ("tool_call_id", "name")


class Speakers:
    """Checks the texts of one template."""

    def __init__(self, render: Callable[[Conversation], str]):
        """
        Args:
            render: The template.
        """
        self._render = render
        self._known: dict[Hashable, str | None] = {}

    def check(self, conversation: Conversation, text: str) -> None:
        """Compare a row's text with those of another speaker, or of a result for another call.

        Raises:
            RowError: There is no difference.
        """
        messages = conversation.messages
        shape = tuple((m.role, not is_blank(m.content), *sorted(m.extra)) for m in messages)
        if shape not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[shape] = self._find_mistaken(conversation, text)
        problem = self._known[shape]
        if problem is not None:
            raise RowError(problem)
        for first, results in _out_of_order(messages):
            turned = [*results[1:], results[0]]
            moved = list(messages)
            for offset, (result, other) in enumerate(zip(results, turned, strict=True)):
                address = {key: other.extra[key] for key in _ADDRESS if key in other.extra}
                moved[first + offset] = replace(result, extra={**result.extra, **address})
            if self._is_same(replace(conversation, messages=tuple(moved)), text):
                raise RowError(
                    f"message {first} (tool) and those behind it answer calls in another order than"
                    " they were made, and the chat template writes no tool_call_id, so the model"
                    " would take one result for the other's: put the results into the order of"
                    " their calls"
                )

    def _find_mistaken(self, conversation: Conversation, text: str) -> str | None:
        messages = conversation.messages
        for index in _first_and_last(messages):
            message = messages[index]
            answer = Message(role=Role.assistant, content=message.content, extra=message.extra)
            if self._is_same(
                replace(conversation, messages=(*messages[:index], answer, *messages[index + 1 :])),
                text,
            ):
                return (
                    f"the chat template writes what message {index} ({message.role.value}) says as"
                    " an answer of the assistant; take a data.chat_template that knows"
                    f" {'tools' if message.role is Role.tool else 'system messages'}, such as qwen,"
                    " or the model's own"
                )
        return None

    def _is_same(self, other: Conversation, text: str) -> bool:
        try:
            return self._render(other) == text
        except TEMPLATE_ERRORS:
            # A template that refuses it tells the two apart.
            return False


def _first_and_last(messages: Sequence[Message]) -> list[int]:
    """Return messages that only a system or a tool may say.

    Many templates know a system message only at the beginning.
    """
    found: set[int] = set()
    for role in (Role.system, Role.tool):
        numbers = [
            index for index, m in enumerate(messages) if m.role is role and not is_blank(m.content)
        ]
        found |= {*numbers[:1], *numbers[-1:]}
    return sorted(found)


def _out_of_order(messages: Sequence[Message]) -> Iterator[tuple[int, list[Message]]]:
    """Find results that follow several calls and do not answer them in the order of the calls.

    Yields:
        The number of the first result, and the results; calls and results without ids say nothing
        of an order.
    """
    for index, message in enumerate(messages):
        calls = [call.get("id") for call in message.extra.get("tool_calls", ())]
        if len(calls) < 2 or None in calls:
            continue
        results = []
        for result in messages[index + 1 :]:
            if result.role is not Role.tool:
                break
            results.append(result)
        answered = [result.extra.get("tool_call_id") for result in results]
        known = all(one in calls for one in answered)
        if len(results) > 1 and known and answered != calls[: len(answered)]:
            yield index + 1, results
