"""Read the search space: which keys are searched, and the values that each may have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

PREFIX = "hparams_search.space"

Scalar = str | int | float | bool | None
"""A value that a key can have in a trial; a list is a text, such as ``[q_proj,v_proj]``."""
Values = dict[str, Scalar]
"""Key -> value of a trial."""

_WORDS = ("low", "high", "log", "step", "choices")
_FORMS = "{low: A, high: B} with log: true or step: C, or {choices: [...]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One searched key: a range of numbers, or choices."""

    key: str
    """A dotted key, or the name of a config group."""
    choices: tuple[Scalar, ...] = ()
    """Empty for a range."""
    low: float = 0
    high: float = 0
    is_log: bool = False
    """The range is searched by the logarithm."""
    step: float | None = None
    """Distance of neighbors in a range; 1 for whole numbers, None for all numbers."""

    @property
    def is_integer(self) -> bool:
        """Tell whether it is a range of whole numbers."""
        return not self.choices and isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def edges(self) -> tuple[Scalar, ...]:
        """The choices, or both ends of the range."""
        return self.choices or (self.low, self.high)

    def list_values(self) -> Sequence[Scalar] | None:
        """Return every value; None for a range without a step."""
        if self.choices:
            return self.choices
        if self.step is None:
            return None
        if self.is_integer:
            return range(int(self.low), int(self.high) + 1, int(self.step))
        return [self._at(number) for number in range(self.count or 0)]

    def _at(self, number: int) -> float:
        """Return a value of a range with a step, counted from 0."""
        # In decimals, as they were written: 0.1 + 2 * 0.1 is above 0.3 in binary ones.
        return float(Decimal(str(self.low)) + number * Decimal(str(self.step)))

    @property
    def count(self) -> int | None:
        """The number of values; None for a range without a step."""
        if self.choices:
            return len(self.choices)
        if self.step is None:
            return None
        low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
        return int((high - low) // step) + 1

    @property
    def last(self) -> float:
        """The last value of a range with a step, which may be below its end."""
        return self._at((self.count or 1) - 1)

    def snap(self, value: Scalar) -> Scalar:
        """Return the listed value that is meant, to the last digit; others as they are."""
        if self.choices or self.step is None or not isinstance(value, float):
            return value
        return self._at(round((value - self.low) / self.step))

    def to_plain(self) -> dict[str, Any]:
        """Return what tells it from another one, as plain values."""
        if self.choices:
            return {"choices": list(self.choices)}
        plain: dict[str, Any] = {"low": self.low, "high": self.high, "log": self.is_log}
        is_plain = self.step is None or (self.is_integer and self.step == 1)
        return plain if is_plain else plain | {"step": self.step}

    def describe(self) -> str:
        """Describe the values for people."""
        if self.choices:
            return ", ".join(map(show, self.choices))
        text = f"{show(self.low)} to {show(self.high)}"
        if self.step not in (None, 1):
            text += f" in steps of {show(self.step)}"
        return f"{text}, by the logarithm" if self.is_log else text


def show(value: Scalar) -> str:
    """Write a value as on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def to_overrides(values: Mapping[str, Scalar]) -> list[str]:
    """Return the settings of a trial as overrides, with every digit."""
    return [
        f"{key}={repr(value) if isinstance(value, float) else show(value)}"
        for key, value in values.items()
    ]


def count_points(space: Sequence[Parameter]) -> int | None:
    """Return the number of different settings; None where a range has no step."""
    counts = [parameter.count for parameter in space]
    return math.prod(count for count in counts if count) if all(counts) else None


def list_points(space: Sequence[Parameter]) -> Iterator[Values]:
    """Yield all settings of a space without endless ranges; the last key changes fastest."""
    keys = [parameter.key for parameter in space]
    for values in itertools.product(*(parameter.list_values() or () for parameter in space)):
        yield dict(zip(keys, values, strict=True))


def read_space(raw: Mapping[str, Any]) -> tuple[list[Parameter], list[str]]:
    """Read ``hparams_search.space``; keys may be dotted, or nested as the command line sets them.

    Returns:
        The parameters that are right, and what is wrong with the others.
    """
    entries = _merge(raw)
    problems = [
        f"{PREFIX}.{key}=null: the space has no such key, so that none can be taken out; it has"
        f" {', '.join(key for key, entry in entries.items() if entry is not None) or 'none'}"
        for key in _find_removed(raw)
    ]
    parameters = []
    for key, entry in entries.items():
        found = list(_find_entry_problems(f"{PREFIX}.{key}", entry))
        problems += found
        if not found:
            parameters.append(_to_parameter(key, entry))
    return parameters, problems


def _merge(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of each key: what the command line says goes over what the file says."""
    # The file has dotted keys, and the command line nests them.
    entries: dict[str, Any] = {}
    for is_dotted in (True, False):
        for key, entry in _flatten({k: v for k, v in raw.items() if ("." in k) is is_dotted}):
            before = entries.get(key)
            replaces = not isinstance(entry, Mapping) or _is_whole(entry)
            entries[key] = entry if before is None or replaces else {**before, **entry}
    return {key: entry for key, entry in entries.items() if entry is not None}


def _find_removed(raw: Mapping[str, Any]) -> list[str]:
    """List keys that are taken out though no file has put them in."""
    dotted = _flatten({key: value for key, value in raw.items() if "." in key})
    nested = _flatten({key: value for key, value in raw.items() if "." not in key})
    there = {key for key, _ in dotted}
    # Of a name without a dot, what the file says is not there any more.
    return [key for key, entry in nested if entry is None and "." in key and key not in there]


def _flatten(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if not isinstance(value, Mapping) or not value:
            yield key, value
            continue
        # A group has choices, and keys of its own may be searched beside them.
        is_entry = bool(set(value) & set(_WORDS))
        keys = {
            name: child
            for name, child in value.items()
            if not is_entry or (isinstance(child, Mapping) and name not in _WORDS)
        }
        if is_entry:
            yield key, {name: child for name, child in value.items() if name not in keys}
        yield from _flatten(keys, f"{key}.")


def _is_whole(entry: Mapping[str, Any]) -> bool:
    return "choices" in entry or {"low", "high"} <= set(entry)


def _find_entry_problems(name: str, entry: Any) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield f"{name}={entry}: {_FORMS}"
        return
    if unknown := [word for word in entry if word not in _WORDS]:
        yield f"{name}.{unknown[0]}: no such word; an entry is {_FORMS}"
    elif "choices" in entry:
        if len(entry) > 1:
            others = ", ".join(word for word in entry if word != "choices")
            yield f"{name}: choices and {others} exclude each other; an entry is {_FORMS}"
        else:
            yield from _find_choice_problems(f"{name}.choices", entry["choices"])
    else:
        yield from _find_range_problems(name, entry)


def _find_choice_problems(name: str, choices: Any) -> Iterator[str]:
    if not isinstance(choices, list) or not choices:
        yield f"{name}={choices}: a list of values, such as [8,16,32]"
        return
    for value in choices:
        if not isinstance(value, Scalar):
            yield (
                f"{name}: {value} is no single value; write a list as a text in quotes, such as"
                " '[q_proj,v_proj]'"
            )
    # 1, 1.0 and true are one value to Python, and to the store of trials.
    values = [value for value in choices if isinstance(value, Scalar)]
    if len(set(values)) < len(values):
        yield f"{name}={choices}: a value is there twice"


def _find_range_problems(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    numbers = {word: entry[word] for word in ("low", "high", "step") if word in entry}
    if not {"low", "high"} <= set(numbers):
        yield f"{name}: a range needs low and high; an entry is {_FORMS}"
        return
    wrong = [word for word, value in numbers.items() if not _is_number(value)]
    if wrong:
        yield f"{name}.{wrong[0]}={numbers[wrong[0]]}: a number"
        return
    low, high, step = entry["low"], entry["high"], entry.get("step")
    is_log = entry.get("log", False)
    if not isinstance(is_log, bool):
        yield f"{name}.log={is_log}: true or false"
    elif low >= high:
        yield f"{name}: low={low} must be below high={high}"
    elif is_log and low <= 0:
        yield f"{name}.low={low}: must be above 0 with log=true"
    elif is_log and step is not None:
        yield f"{name}.step={step}: has no meaning with log=true; leave one of them out"
    elif step is not None and not 0 < Decimal(str(step)) <= Decimal(str(high)) - Decimal(str(low)):
        yield f"{name}.step={step}: must be above 0, and at most high - low"
    elif step is not None and _is_whole_range(entry) and not isinstance(step, int):
        yield f"{name}.step={step}: a whole number, because low and high are"


def _is_whole_range(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry["low"], int) and isinstance(entry["high"], int)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _to_parameter(key: str, entry: Mapping[str, Any]) -> Parameter:
    if "choices" in entry:
        return Parameter(key=key, choices=tuple(entry["choices"]))
    is_log, step = entry.get("log", False), entry.get("step")
    if step is None and _is_whole_range(entry):
        step = 1
    low, high = entry["low"], entry["high"]
    if not _is_whole_range(entry):
        low, high = float(low), float(high)
    return Parameter(key=key, low=low, high=high, is_log=is_log, step=step)
