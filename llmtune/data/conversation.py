"""The one internal type that every data format becomes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Role(Enum):
    """Who speaks."""

    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str

    def to_dict(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": self.role.value, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training row, and where it was read."""

    messages: tuple[Message, ...]
    where: str
    """``file:line``, for error messages."""

    def prompt(self) -> list[dict[str, str]]:
        """Everything before the last answer."""
        return [message.to_dict() for message in self.messages[:-1]]
