"""Convert tool calls and tool definitions from their common forms to that of chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmtune.data.rows.json_objects import decode_json, parse_json
from llmtune.data.rows.problems import RowError, short

#: Fields of a function that is called.
_READ = ("name", "arguments", "id", "type", "index")

#: Names under which a call has its function's name and arguments.
_ELSEWHERE = ("name", "arguments", "parameters", "params", "args", "kwargs", "input", "inputs")


def read_tool_calls(entry: Mapping[str, Any], location: str) -> list[dict[str, Any]]:
    """Read the calls of a message.

    They are ``tool_calls``, a list or its JSON; or one ``function_call``, as in the older API.

    Returns:
        ``{"type": "function", "function": {"name", "arguments"}}`` each, with its ``id`` where it
        has one; ``arguments`` is a mapping, also where it was given as JSON text.

    Raises:
        RowError: Something is no call.
    """
    calls = entry.get("tool_calls") or []
    if isinstance(calls, str):
        calls = _parse(calls, f"{location}: 'tool_calls' is no JSON")
    if not isinstance(calls, list | tuple):
        raise RowError(f"{location}: 'tool_calls' must be a list, not {short(calls)}")
    if entry.get("function_call"):
        calls = [*calls, entry["function_call"]]
    return [_read_call(call, location) for call in calls]


def parse_tool_calls(text: str, location: str) -> list[dict[str, Any]]:
    """Parse the calls of a ``function_call`` turn.

    Its text is the JSON of one call, of a list of them, or of several in a row.

    Raises:
        RowError: It is not.
    """
    calls: list[Any] = []
    position = _between(text, 0)
    while position < len(text):
        try:
            call, position = decode_json(text, position)
        except ValueError as error:
            raise _no_function_call(text, location) from error
        calls += call if isinstance(call, list) else [call]
        position = _between(text, position)
    if not calls or not all(
        isinstance(call, dict) and ("name" in call or "function" in call) for call in calls
    ):
        raise _no_function_call(text, location)
    return [_read_call(call, location) for call in calls]


def _between(text: str, position: int) -> int:
    """Return the position at which the next call begins."""
    while text[position : position + 1] in {" ", "\t", "\r", "\n", ","}:
        position += 1
    return position


def read_tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Read the tools of a row: ``tools``, or ``functions`` of the older API; a list or its JSON.

    Raises:
        RowError: It is no list of function schemas.
    """
    tools, functions = row.get("tools"), row.get("functions")
    if tools and functions:
        raise RowError("the row has 'tools' and 'functions'; keep one of them")
    name = "functions" if functions else "tools"
    tools = functions or tools
    if isinstance(tools, str) and tools.strip():
        tools = _parse(tools, f"{name!r} is no JSON")
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{name!r} must be a list of function schemas, not {short(tools)}")
    if functions:
        return tuple({"type": "function", "function": function} for function in tools)
    return tuple(tools)


def _read_call(call: Any, location: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = _parse(call, f"{location}: a tool call is no JSON")

    # The function, which some write without the call around it.
    function = call.get("function") if isinstance(call, Mapping) else None
    function = call if function is None else function
    name = function.get("name") if isinstance(function, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not isinstance(function, Mapping)
        or not isinstance(name, str)
        or not name.strip()
    ):
        raise RowError(
            f"{location}: a tool call must be {{function: {{name, arguments}}}}, not {short(call)}"
        )
    told = {key: value for key, value in function.items() if value not in (None, "")}
    # Beside the function there may only be fields that say nothing about the call.
    beside = [
        key
        for key in _ELSEWHERE
        if function is not call and call.get(key) not in (None, "", [], {})
    ]
    if beside:
        raise RowError(
            f"{location}: the call of {name!r} has the field {beside[0]!r} beside its function,"
            " where it is not read; name and arguments belong in the function"
        )
    if unread := [key for key in told if key not in _READ]:
        raise RowError(
            f"{location}: the call of {name!r} has the field {unread[0]!r}, which is not read; a"
            " call has name and arguments"
        )

    # The one form that chat templates read.
    outer = {key: call[key] for key in ("id", "index") if call.get(key) is not None}
    arguments = _read_arguments(function.get("arguments"), name, location)
    return {**outer, "type": "function", "function": {"name": name, "arguments": arguments}}


def _read_arguments(arguments: Any, name: str, location: str) -> dict[str, Any]:
    given = arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        arguments = _parse(
            arguments, f"{location}: the arguments of the call of {name!r} are no JSON"
        )
    if not isinstance(arguments, Mapping):
        raise RowError(
            f"{location}: the arguments of the call of {name!r} must be a JSON object, not"
            f" {short(given)}"
        )
    return dict(arguments)


def _parse(text: str, message: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        why = "" if isinstance(error, json.JSONDecodeError) else f" ({error})"
        raise RowError(f"{message}{why}: {short(text)}") from error


def _no_function_call(text: str, location: str) -> RowError:
    return RowError(
        f"{location}: a function_call must be JSON with name and arguments, not {short(text)}"
    )
