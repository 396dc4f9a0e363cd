"""The one internal type that every data format becomes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llmtune.task.labels import Label


class Role(Enum):
    """The speaker of a message."""

    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A turn of a conversation."""

    role: Role
    content: str
    train: bool | None = None
    """True if its words are trained; None where the row does not say.

    Then the assistant's words are trained, and those of others are not.
    """
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields that chat templates read.

    These are ``tool_calls`` with mappings as arguments, ``tool_call_id``, ``name`` and
    ``reasoning_content``.
    """

    @property
    def trained(self) -> bool:
        """Tell whether the words of an answer are trained."""
        return self.train is not False

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that chat templates read."""
        return {"role": self.role.value, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row of the data, whatever its format."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Function schemas for the chat template."""
    plain: bool = False
    """No chat template: the contents are joined as they are, as those of ``text``."""
    label: Label | None = None
    """Label of a row that is judged rather than written; its one or two texts are user messages."""
    words: tuple[str, ...] = ()
    """The words that the tags of ``label`` belong to; the text is made of them."""

    @property
    def uses_tools(self) -> bool:
        """Tell whether there are tools, calls of them, or results."""
        return bool(self.tools) or any(
            m.role is Role.tool or "tool_calls" in m.extra for m in self.messages
        )

    def prompt(self) -> list[dict[str, Any]]:
        """Return everything before the last answer."""
        return [message.to_dict() for message in self.messages[:-1]]

    def expected(self) -> str:
        """Return the last answer: its words, or else the JSON of its calls."""
        answer = self.messages[-1]
        return answer.content or json.dumps(answer.extra.get("tool_calls", []), ensure_ascii=False)
