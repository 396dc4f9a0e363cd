"""Refuse regular expressions from other people's settings that could take years to match.

Python matches by backtracking. An expression is judged by its syntax tree, before anything is
matched: the number of ways in which it can be tried on a name is bounded. The ways of a repeat
multiply with those of what follows it.
"""

from __future__ import annotations

import math
import re

# Moved in Python 3.11, and part of no public interface; the checks of a pattern's structure have no
# other source.
from re import _constants as kinds  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

#: Ways to try one expression on one name; trying them takes milliseconds. A pattern with three
#: ``.*`` has a million.
MAX_WAYS = 20_000_000
#: Characters that an unbounded repeat is counted for; names of modules are shorter.
_NAME_LENGTH = 200
MAX_LENGTH = 5_000

_SINGLE = {kinds.LITERAL, kinds.NOT_LITERAL, kinds.ANY, kinds.IN}
_REPEATS = {kinds.MAX_REPEAT, kinds.MIN_REPEAT}


def pattern_problem(pattern: str) -> str | None:
    """Say why an expression must not be matched; None where it is harmless."""
    if len(pattern) > MAX_LENGTH:
        return f"it has {len(pattern)} characters"
    try:
        ways = _ways(parser.parse(pattern))
    except _CostlyError as error:
        return str(error)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is not a regular expression ({str(error) or type(error).__name__})"
    return None if ways <= MAX_WAYS else "it can be tried on a name in too many ways"


class _CostlyError(Exception):
    """An expression is costly whatever it is matched with."""


def _ways(items: Any) -> float:
    return math.prod(_ways_of(kind, argument) for kind, argument in items)


def _ways_of(kind: Any, argument: Any) -> float:
    if kind in _REPEATS or kind is kinds.POSSESSIVE_REPEAT:
        least, most, inner = argument
        endless = most is kinds.MAXREPEAT
        if endless or most > 1:
            # Repeats of what may itself match in several ways multiply with each character.
            single = len(inner) == 1 and inner[0][0] in _SINGLE
            if not single and (endless or _ways(inner) > 1):
                raise _CostlyError(
                    "it repeats what can itself be matched in several ways, such as (a+)+ or (a|b)*"
                )
            return _NAME_LENGTH if endless else min(_NAME_LENGTH, most - least + 1)
        return float(most - least + 1) * _ways(inner)
    if kind is kinds.BRANCH:
        _, branches = argument
        # If the branches begin with different characters, at most one of them can match.
        heads = [_head(branch) for branch in branches]
        distinct = None not in heads and len(set(heads)) == len(heads)
        ways = [_ways(branch) for branch in branches]
        return max(ways) if distinct else sum(ways)
    if kind is kinds.SUBPATTERN:
        return _ways(argument[-1])
    if kind is kinds.ATOMIC_GROUP:
        return _ways(argument)
    if kind in (kinds.ASSERT, kinds.ASSERT_NOT):
        return _ways(argument[1])
    if kind in (kinds.GROUPREF, kinds.GROUPREF_EXISTS):
        raise _CostlyError("it has a back reference")
    return 1


def _head(branch: Any) -> Any:
    """Return the character that a branch begins with, if it begins with one."""
    kind, argument = branch[0] if len(branch) else (None, None)
    return argument if kind is kinds.LITERAL else None
