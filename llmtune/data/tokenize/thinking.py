"""Explain templates of thinking models that render an answer differently alone and in context."""

from __future__ import annotations

import re

from llmtune.data.tokenize.pieces import TAG

#: Tags that begin or end thinking, in the templates of known models.
_THINKING = re.compile(
    rf"{TAG.pattern}|<\|channel\|>|<\|(?:START|END)_THINKING\|>|<\|(?:begin|end)_of_thought\|>|<unused9[45]>"
)

#: Letters before the first difference of two texts that may be the beginning of a tag.
_TAG_LETTERS = 24

#: Letters after that position within which thinking has to begin, or end where it is empty.
_NEAR = 48

_NO_THINKING = (
    "data.chat_template=qwen or chatml, which know no thinking (use the same one at inference)"
)


def explain_difference(location: str, prompt: str, upto: str, text: str) -> str | None:
    """Explain why thinking hides the tokens of an answer; None where that is not the reason.

    Args:
        location: Of the answer.
        prompt: The text up to it, with what precedes an answer.
        upto: What is rendered up to it and with it.
        text: The whole text.
    """
    if not upto.startswith(prompt):
        if tag := _find_thinking(prompt, upto):
            return (
                f"the chat template opens the thinking of an answer in the prompt ({tag!r}), and"
                f" writes the answer in {location} without thinking, so the model would never be"
                " asked as it was trained. Rows for templates that think in the prompt cannot be"
                f" trained yet: take {_NO_THINKING}, or a copy of the template that puts nothing"
                " behind the beginning of an answer"
            )
        return None
    # One of them has thinking where the other has words.
    if _find_thinking(upto, text) or _find_thinking(text, upto):
        return (
            f"the chat template writes the answer in {location} with thinking where it is the last,"
            " and without where more is said, as models that think forget what they thought; its"
            " tokens in one row are not those that the model would make. What can be trained: a"
            " row for each answer, in which only the last is trained and the answers before it"
            f" have 'train': false; or {_NO_THINKING}"
        )
    return None


def _find_thinking(text: str, other: str) -> str | None:
    """Find a tag of thinking where another text first differs from this one, or soon after."""
    shorter = min(len(text), len(other))
    parting = next((at for at in range(shorter) if text[at] != other[at]), shorter)
    # Both may have the first letters of what is a tag in one of them.
    found = _THINKING.finditer(text, max(0, parting - _TAG_LETTERS), parting + _NEAR)
    return next((tag[0] for tag in found if tag.end() > parting), None)
