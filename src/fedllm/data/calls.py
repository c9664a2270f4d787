"""Tool calls and tool schemas as files and requests write them, read into one shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedllm.data.faults import RowFault
from fedllm.data.rows import ToolCall

_CALL = 'Write {"name": ..., "arguments": {...}}'
_TOOLS = 'Write a list of {"name": ..., "description": ..., "parameters": {...}}, or its JSON'


def read_calls(turn: Mapping[str, Any], place: str) -> tuple[ToolCall, ...]:
    """Return the calls of an assistant message in OpenAI's shape, the older one included.

    Raises:
        RowFault: If one has no name, or arguments that are no object.
    """
    calls = turn.get("tool_calls")
    if not calls:
        older = turn.get("function_call")
        return () if not older else (_call(older, None, place),)
    if not isinstance(calls, (list, tuple)):
        raise RowFault("bad tool call", f"{place}: tool_calls must be a list")
    found = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else call
        found.append(_call(inner, call.get("id") if isinstance(call, Mapping) else None, place))
    return tuple(found)


def read_call(value: Any, place: str) -> tuple[ToolCall, ...]:
    """Return the calls of a ShareGPT `function_call` message: an object, a list, or its JSON.

    Raises:
        RowFault: If it is none of these.
    """
    if isinstance(value, str):
        value = _parsed(value, f"{place}: the call", "bad tool call", _CALL)
    calls = value if isinstance(value, (list, tuple)) else [value]
    if not calls:
        raise RowFault("bad tool call", f"{place} calls nothing", _CALL)
    return tuple(_call(call, None, place) for call in calls)


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return schemas, each as `{"type": "function", "function": {...}}`.

    Args:
        value: A list of schemas, one schema, the JSON of either, or nothing.

    Raises:
        RowFault: If a schema has no name or is none.
    """
    if isinstance(value, str):
        value = _parsed(value, "the tools", "bad tools", _TOOLS) if value.strip() else None
    if not value:
        return ()
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, (list, tuple)):
        raise RowFault("bad tools", f"tools must be a list, not a {type(tools).__name__}", _TOOLS)
    return tuple(_tool(tool, number) for number, tool in enumerate(tools, start=1))


def _tool(tool: Any, number: int) -> Mapping[str, Any]:
    if isinstance(tool, str):
        tool = _parsed(tool, f"tool {number}", "bad tools", _TOOLS)
    if not isinstance(tool, Mapping):
        raise RowFault("bad tools", f"tool {number} is a {type(tool).__name__}", _TOOLS)
    kind = tool.get("type", "function")
    inner = tool.get("function", tool)
    if kind != "function" and "function" not in tool and "name" not in tool:
        raise RowFault("bad tools", f"tool {number} is of the type '{kind}', no function", _TOOLS)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowFault("bad tools", f"tool {number} has no name", _TOOLS)
    return tool if inner is not tool else {"type": "function", "function": dict(tool)}


def _call(call: Any, call_id: Any, place: str) -> ToolCall:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not call["name"]:
        raise RowFault("bad tool call", f"{place} has a tool call without a name", _CALL)
    arguments = call.get("arguments")
    what = f"{place}: the arguments of '{call['name']}'"
    if isinstance(arguments, str):
        arguments = _parsed(arguments, what, "bad tool call", _CALL) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise RowFault("bad tool call", f"{what} are a {kind}, no object", _CALL)
    return ToolCall(call["name"], arguments, None if call_id is None else str(call_id))


def _parsed(text: str, what: str, reason: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowFault(
            reason, f"{what} is no JSON: {error.msg} at column {error.colno}", remedy
        ) from None
