"""Tell harmless fields of a row from those that would change what is learned if they were dropped.

A field that no format reads is ignored silently only if it is in the one list of harmless names.
One that says what is to be learned, and how, is refused by name. All others are listed once for the
user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmtune.data.rows.problems import RowError, short

#: Fields of a message that say whether its words are trained: true or 1, false or 0.
TRAINED = (
    "train",
    "trained",
    "trainable",
    "training",
    "loss",
    "compute_loss",
    "loss_mask",
    "weight",
    "loss_weight",
)

#: Fields of a message that say the opposite.
MASKED = ("masked", "is_masked")

#: Names under which messages hold what the model thought before its words.
REASONING = ("reasoning_content", "reasoning", "thinking")

#: Names that a line of a report lists.
LISTED = 20

_SAID = {*REASONING, "name", "tool_call_id", "tool_calls", "function_call", *TRAINED, *MASKED}

#: The two common ways to name the speaker and the contents.
SPELLINGS = (("role", "content"), ("from", "value"))
_PLAIN = tuple(map(set, SPELLINGS))
_PART_FIELDS = frozenset({"type", "text"})
_CALL_FIELDS = frozenset({"id", "type", "index", "function", "name", "arguments"})

#: Names that say where something comes from and how long it is, in small letters. Nothing is
#: learned from them.
HARMLESS = frozenset(
    {
        # Identity.
        "id",
        "_id",
        "ids",
        "idx",
        "index",
        "uid",
        "uuid",
        "guid",
        "key",
        "qid",
        "pid",
        "hash",
        "hashed_ip",
        "sha",
        "sha1",
        "sha256",
        "md5",
        "digest",
        "checksum",
        "fingerprint",
        "turn_identifier",
        "__index_level_0__",
        # Source.
        "source",
        "sources",
        "dataset",
        "dataset_name",
        "data_source",
        "subset",
        "split",
        "origin",
        "collection",
        "corpus",
        "file",
        "filename",
        "file_name",
        "filepath",
        "path",
        "url",
        "uri",
        "link",
        "domain",
        "host",
        "dump",
        "repo",
        "repository",
        "commit",
        "branch",
        "licence",
        "license",
        "author",
        "authors",
        "annotator",
        "creator",
        "publisher",
        "provenance",
        "model",
        "model_name",
        "generator",
        "engine",
        "provider",
        "username",
        # Language and place.
        *("language", "languages", "lang", "locale", "country", "state"),
        *("language_score", "language_confidence", "lang_score"),
        # Time.
        "timestamp",
        "time",
        "date",
        "datetime",
        "created",
        "updated",
        "modified",
        "published",
        "year",
        # Description.
        "title",
        "topic",
        "topics",
        "category",
        "categories",
        "subcategory",
        "tag",
        "tags",
        "task",
        "task_name",
        "task_type",
        "type",
        "kind",
        "subject",
        "difficulty",
        "level",
        "genre",
        "keywords",
        "metadata",
        "meta",
        *("comment", "comments", "note", "notes", "version", "views"),
        # Counts.
        "length",
        "len",
        "num_turns",
        "num_tokens",
        "n_tokens",
        "token_count",
        "word_count",
        "char_count",
        *("num_chars", "size", "seed"),
        # What an API adds to its answers.
        "finish_reason",
        "stop_reason",
        "usage",
        "cache_control",
        "parallel_tool_calls",
        "object",
        "service_tier",
        *("system_fingerprint", "temperature", "top_p", "max_tokens", "header"),
    }
)

_HARMLESS_ENDING = re.compile(
    r".+_(id|ids|idx|uid|uuid|url|urls|uri|path|hash|sha|date|time|timestamp|at|lang|language|source|license|version|count)"
)

#: Between the words of a name: dataSource, data-source and "data source" are data_source.
_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]+")

#: Names that would change what is learned, and what llmtune makes of them.
_CHANGES: list[tuple[re.Pattern[str], str]] = [
    (
        re.compile("labels"),
        (
            "is not read under this name: where it is the class or the number of a text, add"
            " fields: {label: labels} to the source"
        ),
    ),
    (
        re.compile(
            r"(input|token|prompt|completion|position|token_type|label|target)_ids|attention_mask|.+_masks?"
        ),
        "holds tokens or a mask of them, and llmtune makes its own",
    ),
    (
        re.compile(
            r"label|kto(_.*)?|(.*_)?preference(s|_.*)?|(dis|un|non_?)?preferred(_.*)?|"
            r"(.*_)?(chosen|rejected)(_.*)?|(hard_)?negatives?(_.*)?|"
            r"(.*_)?(scores?|ratings?|rewards?|votes?)(_.*)?|upvotes|downvotes|(.*_)?rank(s|ing|ings)?|"
            r"(.*_)?(winner|loser|better|worse|best|worst)(_.*)?|margin|advantages?|quality|(un)?desirable|feedback|"
            r"(is_)?(in)?(correct|valid|accurate)|(is_)?(wrong|preferred|accepted|good|bad|safe|unsafe|toxic|harmful|harmless)|"
            r"(in)?correctness|helpfulness|harmlessness|toxicity|polarity|grades?|verdict|judge?ments?|thumbs?(_.*)?|"
            r"(is_)?(passed|failed|success|successful)"
        ),
        (
            "says how good an answer is, and every answer is learned as one to give: keep the rows"
            " that are to be learned, and take the field out"
        ),
    ),
    (
        re.compile(
            r"(.*_)?(images?|imgs?|photos?|pictures?|audios?|videos?|pixels?|speech|voice)(_.*)?|media|attachments?|"
            r"(mm|multi_?modal)_(data|inputs?)"
        ),
        "is no text, and only text can be trained",
    ),
    (
        re.compile(
            r"masks?|loss_scale|losses|weights|(sample|row|example|instance|importance|token|turn|message|loss)_weights?|"
            r"(.*_)?(is|do|to|no|not|on|in|for|use|with|has|should|compute|calculate|apply|include|exclude|ignore|skip)_"
            r"(loss|train|training|trained|learn|learned|learning|supervision|supervised|grad|gradients?|backprop)|"
            r"(train|training|loss)_(detail|on)s?(_.*)?|supervised?|learn|learned|learnable|ignored?|skip|skipped"
        ),
        "says what is trained, and only 'train' in a message can say so, true or false",
    ),
    (
        re.compile(
            r"system(_(prompt|message|instruction|content))?|tools|functions|(available_)?tools|tool_(calls|call|use|uses)|"
            r"function_call|reasoning(_content|_details|_text|_effort)?|thinking(_content|_budget)?|thoughts?|chain_of_thoughts?|"
            r"cot|rationales?|chat_template(_kwargs)?|enable_thinking|refusal|documents|builtin_tools|add_generation_prompt"
        ),
        (
            "belongs to the text, and is not read here: give it the name by which the format knows"
            " it, in the file or with fields of the source"
        ),
    ),
]


def find_unknown_fields(
    row: Mapping[str, Any], known: frozenset[str], lists: Sequence[str]
) -> set[str]:
    """Find fields of a row, its messages and parts that are neither read nor known to be harmless.

    Args:
        known: Those that the format reads.
        lists: Those that hold its messages, or the turns before them.

    Raises:
        RowError: A field that is not read would change what is learned.
    """
    unknown = set(_judge(row, known, "", "")) if not row.keys() <= known else set()
    for field in lists:
        entries = row.get(field)
        for number, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
            # Most messages have only a speaker and contents.
            plain = (
                type(entry) is dict
                and entry.keys() in _PLAIN
                and list not in map(type, entry.values())
            )
            if not plain and isinstance(entry, Mapping):
                unknown.update(_judge_message(entry, field, f"{field}[{number}]"))
    return unknown


def says_nothing_else(entry: Mapping[str, Any]) -> bool:
    """Tell whether every field of a message is read, so that no other field can hold its words."""
    return entry.keys() <= _SAID.union(*_PLAIN)


def refuse_changing_fields(fields: Mapping[str, Any]) -> None:
    """Look at fields of which none is read.

    Raises:
        RowError: One would change what is learned.
    """
    for _ in _judge(fields, frozenset(), "", ""):
        pass


def without_fields(row: Mapping[str, Any], ignored: frozenset[str]) -> Mapping[str, Any]:
    """Remove some fields from a row, its messages and their parts."""
    return {
        name: prune(value, ignored) if isinstance(value, list | tuple) else value
        for name, value in row.items()
        if name not in ignored
    }


def prune(entries: list[Any] | tuple[Any, ...], ignored: frozenset[str]) -> list[Any]:
    """Remove some fields from the mappings of a list."""
    return [
        without_fields(entry, ignored) if isinstance(entry, Mapping) else entry for entry in entries
    ]


def describe_unknown_fields(names: Iterable[str]) -> str:
    """List the names, at most ``LISTED`` of them."""
    every = sorted(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more


def _judge_message(message: Mapping[str, Any], field: str, location: str) -> Iterator[str]:
    # A message that has both forms says the same in both.
    known = frozenset(_SAID.union(*_PLAIN))
    if not message.keys() <= known:
        yield from _judge(message, known, f"{location}: ", f"{field}[].")
    for name, inner in (
        ("content", _PART_FIELDS),
        ("value", _PART_FIELDS),
        ("tool_calls", _CALL_FIELDS),
    ):
        parts = message.get(name)
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            # The reader of a part that is no text says what is wrong with it.
            read = isinstance(part, Mapping) and (
                name == "tool_calls" or part.get("type") == "text"
            )
            if read and not part.keys() <= inner:
                yield from _judge(
                    part, inner, f"{location}.{name}[{number}]: ", f"{field}[].{name}[]."
                )


def _judge(
    fields: Mapping[str, Any], known: frozenset[str], location: str, path: str
) -> Iterator[str]:
    """Return the unknown fields.

    Args:
        location: Of the mapping, for messages: ``messages[1]: ``.
        path: Of its fields, without numbers: ``messages[].``.
    """
    for name, value in fields.items():
        if name in known or value is None or value in ("", [], {}, ()):
            continue
        lower = _BORDER.sub("_", str(name)).lower()
        if lower in HARMLESS or lower in TRAINED + MASKED:
            if lower not in HARMLESS and not _says_nothing(lower, value):
                raise RowError(
                    f"{location}the field {name!r} ({short(value)}) says that this is not trained"
                    " like the rest, and only a whole message can say so: put it into the"
                    f" messages, or take the row out; {_ignoring(name)}"
                )
            continue
        for pattern, reason in _CHANGES:
            if pattern.fullmatch(lower):
                raise RowError(
                    f"{location}the field {name!r} ({short(value)}) {reason}; {_ignoring(name)}"
                )
        if not _HARMLESS_ENDING.fullmatch(lower):
            yield f"{path}{name}"


def _ignoring(name: str) -> str:
    return f"where it does not matter, add ignore: [{name}] to the source"


def _says_nothing(name: str, value: Any) -> bool:
    """Tell whether a field says that something is trained as everything else is."""
    text = str(value).strip().lower()
    return text in (("false", "0", "0.0") if name in MASKED else ("true", "1", "1.0"))
