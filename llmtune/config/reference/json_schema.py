"""Describe the configuration as a JSON Schema (draft 2020-12), for editors and other programs.

It describes YAML files: the ``config.yaml`` of a run, and overlays such as
``experiment/mine.yaml``, which hold some of the keys.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, get_args, get_origin

from llmtune.config.groups.profile import MOST_STEPS
from llmtune.config.groups.train import EPOCH, NO, STEPS
from llmtune.config.keys import NAMES, SOURCES, YAML_ALIASES
from llmtune.config.reference.entries import GroupEntry, KeyEntry, read_entries
from llmtune.config.stored import to_plain
from llmtune.config.value_rules import BELOW_ONE, COUNTS_OR_AUTO, NOT_NEGATIVE, PATHS, POSITIVE

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]
#: Key -> the names of the registered variants that it takes.
Variants = Mapping[str, Sequence[str]]

_TEXT: Schema = {"type": "string"}
_SIZE: Schema = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*[\d.]+\s*([KMGTPkmgtp][Ii]?)?[Bb]?\s*$"},
    ]
}
#: A path that is not empty.
_PLACE: Schema = {"type": "string", "pattern": r"\S"}
_COUNT: Schema = {"type": "integer", "exclusiveMinimum": 0}
_TOKENS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "minLength": 1}]},
}
#: A value that a YAML file looks up.
_LOOKUP: Schema = {"type": "string", "pattern": r"\$\{.+\}"}

#: Words of keys that also take something else; of all others it is ``auto``.
_WORDS: dict[str, list[Any]] = {
    "train.eval_strategy": [STEPS, EPOCH, NO, False],
    "train.save_strategy": [STEPS, EPOCH, NO, False],
    "zero.stage": [0, 1, 2, 3, "auto"],
}
_BOUNDS: dict[str, Schema] = {
    "schedule.decay_ratio": {"maximum": 1},
    "profile.steps": {"maximum": MOST_STEPS},
    "predict.top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "data.max_overlong_share": {"minimum": 0, "maximum": 1},
    "data.num_workers": {"minimum": 0},
    "train.eval_max_rows": {"exclusiveMinimum": 0},
    "optim.learning_rate": {"exclusiveMinimum": 0},
    "tracker.prometheus_port": {"minimum": 0, "maximum": 65535},
}


def make_json_schema(variants: Variants) -> Schema:
    """Return the JSON Schema of the whole configuration.

    Args:
        variants: Of each key that takes the name of a registered variant.
    """
    root = _describe_group(read_entries(), variants)
    properties = root["properties"]
    for alias, key in YAML_ALIASES.items():
        group, _, name = key.partition(".")
        properties[alias] = {
            **properties[group]["properties"][name],
            "description": f"Short for {key}.",
        }
    properties["defaults"] = {
        "type": "array",
        "description": "Hydra's list of the files that this one builds on.",
    }
    root["description"] = "The configuration of llmtune, or a part of it."
    return {"$schema": DIALECT, "title": "llmtune", **root, "$defs": _definitions(variants)}


def describe_value(entry: KeyEntry, variants: Variants) -> Schema:
    """Return the schema of a key's value as it stands in a file, without its documentation."""
    key, hint = entry.key, entry.hint
    if key in _WORDS:
        return {"enum": _WORDS[key]}
    if key in variants:
        return {"enum": list(variants[key])}
    if key == "tracker.kinds":
        return {"type": "array", "items": {"enum": list(variants["tracker.kind"])}}
    if key == "optim.betas":
        beta = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
        return {"type": "array", "minItems": 2, "maxItems": 2, "items": beta}
    if hint is Any:
        return _describe_untyped(key, entry.default)
    if key in PATHS:
        return _replace_text(_describe_type(hint, {}), _PLACE)
    return _describe_type(hint, _bounds_of(key))


def _describe_group(group: GroupEntry, variants: Variants) -> Schema:
    properties: Schema = {}
    for entry in group.keys:
        value = describe_value(entry, variants)
        if not {"string"} & {one.get("type") for one in (value, *value.get("anyOf", []))}:
            value = {"anyOf": [*value.get("anyOf", [value]), {"$ref": "#/$defs/lookup"}]}
        described = {"description": entry.text, **value}
        if entry.has_default:
            described["default"] = _plain_default(entry.default)
        if entry.unit:
            described["x-unit"] = entry.unit
        properties[entry.key.rpartition(".")[2]] = described
    for inner in group.groups:
        properties[inner.name.rpartition(".")[2]] = _describe_group(inner, variants)
    return {
        "description": group.text,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _plain_default(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else to_plain(value)


def _definitions(variants: Variants) -> Schema:
    names: Schema = {"type": "array", "items": {"type": "string"}}
    source = {
        "type": "object",
        "required": ["path"],
        "additionalProperties": False,
        "properties": {
            "path": {"type": "string", "minLength": 1},
            "format": {"enum": list(variants["data.format"])},
            "fields": {"type": "object", "additionalProperties": {"type": "string"}},
            "ignore": names,
            "limit": {"anyOf": [_COUNT, {"type": "null"}]},
            "repeat": _COUNT,
            "weight": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]},
            "split": _TEXT,
            "name": {"type": ["string", "null"]},
            "revision": {"type": ["string", "null"]},
        },
    }
    return {
        "lookup": _LOOKUP,
        "size": _SIZE,
        "source": {"anyOf": [{"type": "string", "minLength": 1}, source]},
    }


def _describe_untyped(key: str, default: Any) -> Schema:
    """Describe a key that takes what no annotation of OmegaConf can say."""
    null: list[Schema] = [{"type": "null"}] if default is None else []
    if key in SOURCES:
        one = {"$ref": "#/$defs/source"}
        return {"anyOf": [one, {"type": "array", "minItems": 1, "items": one}, *null]}
    if key in NAMES:
        return {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, *null]}
    if key == "data.class_weights":
        weights = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}
        return {"anyOf": [{"enum": ["none", "balanced"]}, weights]}
    if key == "tuner.trainable_token_indices":
        by_table = {"type": "object", "minProperties": 1, "additionalProperties": _TOKENS}
        return {"anyOf": [_TOKENS, by_table, *null]}
    return {"anyOf": [{"$ref": "#/$defs/size"}, *null]}


def _replace_text(schema: Schema, text: Schema) -> Schema:
    options = [text if option == _TEXT else option for option in schema.get("anyOf", [schema])]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _bounds_of(key: str) -> Schema:
    bounds = dict(_BOUNDS.get(key, {}))
    if key in POSITIVE or key in COUNTS_OR_AUTO:
        bounds["exclusiveMinimum"] = 0
    if key in NOT_NEGATIVE:
        bounds["minimum"] = 0
    if key in BELOW_ONE:
        bounds["exclusiveMaximum"] = 1
    return bounds


def _describe_type(hint: Any, bounds: Schema) -> Schema:
    if isinstance(hint, types.UnionType):
        return _describe_union(list(get_args(hint)), bounds)
    if isinstance(hint, type) and issubclass(hint, Enum):
        # A stored configuration has the name of a member, which can differ from its value.
        words = [word for member in hint for word in (member.value, member.name)]
        return {"enum": list(dict.fromkeys(words))}
    if get_origin(hint) is list:
        return {"type": "array", "items": _describe_type(get_args(hint)[0], {})}
    if get_origin(hint) is dict:
        return {"type": "object"}
    simple: dict[Any, Schema] = {
        bool: {"type": "boolean"},
        int: {"type": "integer", **bounds},
        float: {"type": "number", **bounds},
        str: _TEXT,
        type(None): {"type": "null"},
    }
    return simple[hint]


def _describe_union(kinds: list[Any], bounds: Schema) -> Schema:
    null = type(None)
    if set(kinds) == {str, null}:
        return {"anyOf": [_TEXT, {"type": "null"}]}
    options: list[Schema] = []
    for kind in kinds:
        if kind is int and float in kinds:
            continue
        options.append({"const": "auto"} if kind is str else _describe_type(kind, bounds))
    return options[0] if len(options) == 1 else {"anyOf": options}
