"""``data=token_classification``: words, and a tag for each."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, PromptFormat, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.label_values import read_class
from llmtune.data.rows.problems import RowError, short
from llmtune.data.rows.values import Row, check_unicode, is_blank, read_list
from llmtune.task.labels import UNKNOWN, LabelKind, Tags


def _read(row: Row) -> Conversation:
    """Read ``tokens``, a list of words; and ``tags``, a list of as many names or integers."""
    words = _read_words(row)
    tags = [read_class(tag, "tags") for tag in read_list(row, "tags")]
    if len(tags) != len(words):
        raise RowError(f"there are {len(words)} 'tokens' and {len(tags)} 'tags'")
    if any(isinstance(tag, float) for tag in tags) or len(set(map(type, tags))) > 1:
        raise RowError(f"'tags' must be all names, or all integers, not {short(tags)}")
    return _to_conversation(words, Tags(tags))  # type: ignore[arg-type]


def _read_prompt(row: Row) -> Conversation:
    """The same without ``tags``."""
    words = _read_words(row)
    return _to_conversation(words, Tags([UNKNOWN] * len(words)))


def _read_words(row: Row) -> list[str]:
    words = read_list(row, "tokens")
    for word in words:
        if not isinstance(word, str) or is_blank(word):
            raise RowError(f"'tokens' must hold words, not {short(word)}")
        check_unicode(word, "tokens")
    return words


def _to_conversation(words: list[str], tags: Tags) -> Conversation:
    return Conversation(
        messages=(Message(role=Role.user, content=" ".join(words)),),
        plain=True,
        label=tags,
        words=tuple(words),
    )


FORMATS.register(
    RowFormat(
        name="token_classification",
        read=_read,
        fields=frozenset({"tokens", "tags"}),
        marks=(frozenset({"tokens", "tags"}),),
        priority=50,
        lists=("tokens", "tags"),
        has_labels=True,
        prompt=PromptFormat(
            read=_read_prompt,
            marks=(frozenset({"tokens"}),),
            lists=("tokens",),
            label_kinds=(LabelKind.tags,),
        ),
    )
)
