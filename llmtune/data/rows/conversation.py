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
    """Whether its words are trained; None where the row does not say: the assistant's are, what
    others say is not.
    """
    extra: dict[str, Any] = field(default_factory=dict)
    """More that chat templates read: ``tool_calls`` with mappings as arguments, ``tool_call_id``,
    ``name``, ``reasoning_content``."""

    @property
    def trained(self) -> bool:
        """Whether the words of an answer are trained."""
        return self.train is not False

    def to_dict(self) -> dict[str, Any]:
        """The mapping that chat templates read."""
        return {"role": self.role.value, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row of the data, whatever its format."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Function schemas for the chat template."""
    plain: bool = False
    """No chat template: the contents are joined as they are (``text``, ``prompt/completion``,
    classification).
    """
    label: Label | None = None
    """Of a row that is judged rather than written; its one or two texts are user messages."""
    words: tuple[str, ...] = ()
    """The words that the tags of ``label`` belong to; the text is made of them."""

    @property
    def uses_tools(self) -> bool:
        """Whether there are tools, calls of them, or what they gave."""
        return bool(self.tools) or any(
            m.role is Role.tool or "tool_calls" in m.extra for m in self.messages
        )

    def prompt(self) -> list[dict[str, Any]]:
        """Everything before the last answer."""
        return [message.to_dict() for message in self.messages[:-1]]

    def expected(self) -> str:
        """The last answer: its words, or else the JSON of its calls."""
        answer = self.messages[-1]
        return answer.content or json.dumps(answer.extra.get("tool_calls", []), ensure_ascii=False)
