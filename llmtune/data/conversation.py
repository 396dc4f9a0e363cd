"""The one internal type that every data format becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Role(Enum):
    """Who speaks."""

    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    train: bool = True
    """Whether the assistant's words are trained; what others say is not, whatever stands here."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More that chat templates read: ``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content``."""

    def to_dict(self) -> dict[str, Any]:
        """As chat templates want it."""
        return {"role": self.role.value, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of the data."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Function schemas for the chat template."""
    plain: bool = False
    """No chat template: the contents are joined as they are (``text``, ``prompt/completion``, classification)."""
    label: str | int | float | None = None
    """Class or value of a classification row; its one or two texts are user messages."""

    def prompt(self) -> list[dict[str, Any]]:
        """Everything before the last answer."""
        return [message.to_dict() for message in self.messages[:-1]]
