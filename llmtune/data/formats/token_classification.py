"""``data=token_classification``: words, and a tag for each."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.label_values import read_class
from llmtune.data.rows.problems import RowError, short
from llmtune.data.rows.values import Row, check_unicode, is_blank, read_list
from llmtune.task.labels import Tags


def _read(row: Row) -> Conversation:
    """Read ``tokens``, a list of words; and ``tags``, a list of as many names or integers."""
    words = read_list(row, "tokens")
    for word in words:
        if not isinstance(word, str) or is_blank(word):
            raise RowError(f"'tokens' must hold words, not {short(word)}")
        check_unicode(word, "tokens")
    tags = [read_class(tag, "tags") for tag in read_list(row, "tags")]
    if len(tags) != len(words):
        raise RowError(f"there are {len(words)} 'tokens' and {len(tags)} 'tags'")
    if any(isinstance(tag, float) for tag in tags) or len(set(map(type, tags))) > 1:
        raise RowError(f"'tags' must be all names, or all integers, not {short(tags)}")
    return Conversation(
        messages=(Message(role=Role.user, content=" ".join(words)),),
        plain=True,
        label=Tags(tags),  # type: ignore[arg-type]
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
    )
)
