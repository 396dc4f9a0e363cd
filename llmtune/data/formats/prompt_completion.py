"""``data=prompt_completion``: two texts without a template, or two lists of messages with it."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, PromptFormat, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.turns import from_turns, is_answer, list_switches, prompt_from_turns
from llmtune.data.rows.values import Row, read_list, read_text


def _read(row: Row) -> Conversation:
    """Read ``prompt`` and ``completion``.

    They are two texts without a template, or two lists of messages with it.
    """
    if isinstance(row.get("prompt"), list | tuple):
        turns = [*read_list(row, "prompt"), *read_list(row, "completion")]
        asked = len(read_list(row, "prompt"))
        # Only the completion is trained, also where the prompt holds earlier answers that do not
        # say so.
        messages = []
        for index, turn in enumerate(turns):
            if index < asked and is_answer(turn) and not list_switches(turn):
                turn = {**turn, "train": False}
            messages.append(turn)
        return from_turns({**row, "messages": messages}, "messages")
    prompt, completion = read_text(row, "prompt"), read_text(row, "completion")
    return Conversation(
        messages=(
            Message(role=Role.user, content=prompt),
            Message(role=Role.assistant, content=completion),
        ),
        plain=True,
    )


def _read_prompt(row: Row) -> Conversation:
    """``prompt``: a text without a template, or a list of messages with it."""
    if isinstance(row.get("prompt"), list | tuple):
        return prompt_from_turns({**row, "messages": row["prompt"]}, "messages")
    message = Message(role=Role.user, content=read_text(row, "prompt"))
    return Conversation(messages=(message,), plain=True)


def _beside_lists(row: Row) -> frozenset[str]:
    """Fields that are read beside two lists of messages, and not beside two texts."""
    if isinstance(row.get("prompt"), list | tuple):
        return frozenset({"system", "tools", "functions"})
    return frozenset()


FORMATS.register(
    RowFormat(
        name="prompt_completion",
        read=_read,
        fields=frozenset({"prompt", "completion"}),
        marks=(frozenset({"prompt", "completion"}),),
        priority=40,
        lists=("prompt", "completion"),
        lists_may_be_texts=True,
        more_fields=_beside_lists,
        prompt=PromptFormat(read=_read_prompt, marks=(frozenset({"prompt"}),), lists=("prompt",)),
    )
)
