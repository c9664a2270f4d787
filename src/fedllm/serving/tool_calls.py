"""Calls of functions in what a model writes, in the ways of the families that chat templates show.

A call is taken as one only if it names a function that was offered, with arguments that its schema
allows; anything else stays text, so that nothing a model says is lost.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.errors import MissingExtraError
from fedllm.serving.refusals import Refusal

Family = Literal["qwen", "mistral", "llama3"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL, _ARGS, _PYTHON = "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"


@dataclass(frozen=True)
class FoundCall:
    """A call that a model has written."""

    id: str
    name: str
    arguments: str
    """A JSON object."""


def family_of(template: str) -> Family | None:
    """Tell from a chat template how its models write calls; None if it is not known."""
    if _OPEN in template:
        return "qwen"
    if _MISTRAL in template:
        return "mistral"
    if _PYTHON in template or '"parameters"' in template or "'parameters'" in template:
        return "llama3"
    return None


class Offered:
    """The functions that may be called, and their schemas.

    Args:
        functions: Name to the JSON Schema of its arguments.

    Raises:
        Refusal: If a schema is none.
    """

    def __init__(self, functions: Mapping[str, Mapping[str, Any]]) -> None:
        self._validators = {name: _validator(name, schema) for name, schema in functions.items()}

    def call(self, tree: Any) -> FoundCall | None:
        """Return the call that a JSON value stands for; None if it is not one of those offered."""
        if not isinstance(tree, dict):
            return None
        name = tree.get("name")
        arguments = tree.get("arguments", tree.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = parsed(arguments)
        validator = self._validators.get(name) if isinstance(name, str) else None
        if validator is None or not isinstance(arguments, dict):
            return None
        try:
            if not validator.is_valid(arguments):
                return None
        except Exception:
            # a schema whose references lead nowhere, or in a circle, allows nothing
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        return FoundCall("call_" + secrets.token_hex(12), str(name), text)


def parsed(text: str) -> Any:
    """Return a JSON value, or None where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class CallReader:
    """Divides an answer, as it comes, into text and calls.

    Args:
        family: How calls are written.
        offered: Which may be made.
        is_parallel: Whether more than one may.
        controls: Control tokens of the tokenizer, which are never part of the text.
    """

    def __init__(
        self, family: Family, offered: Offered, controls: Sequence[str], *, is_parallel: bool = True
    ) -> None:
        self._family, self._offered, self._is_parallel = family, offered, is_parallel
        self._controls = [c for c in controls if c not in (_OPEN, _CLOSE, _MISTRAL, _PYTHON)]
        self._held = ""
        self._has_begun = False
        self._is_after_call = False
        self.num_calls = 0

    def feed(self, text: str) -> tuple[str, list[FoundCall]]:
        """Take more of the answer; return the text and the calls that are certain by now."""
        self._held += text
        if self._is_after_call:  # blanks between calls are no text
            self._held = self._held.lstrip()
            self._is_after_call = not self._held
        if self._family == "qwen":
            return self._blocks()
        mark = _MISTRAL if self._family == "mistral" else _PYTHON
        start = self._held.find(mark)
        if start < 0 and self._family == "llama3" and not self._has_begun:
            stripped = self._held.lstrip()
            if not stripped:
                return "", []
            start = 0 if stripped[0] == "{" else -1
        if start >= 0:
            self._has_begun = self._has_begun or start > 0
            said, self._held = self._held[:start], self._held[start:]
            return self._clean(said), []
        return self._said(mark), []

    def finish(self) -> tuple[str, list[FoundCall]]:
        """Return what was held back, now that nothing follows."""
        held, self._held = self._held, ""
        calls: list[FoundCall] = []
        if self._family == "qwen":
            call = self._offered.call(parsed(held.removeprefix(_OPEN)))
            calls = [] if call is None or not held.startswith(_OPEN) else [call]
        elif self._family == "mistral" and held.startswith(_MISTRAL):
            calls = self._list(held.removeprefix(_MISTRAL))
        elif self._family == "llama3":
            calls = self._list(held.strip().removeprefix(_PYTHON))
        taken = self._allowed(calls)
        return ("", taken) if calls else (self._clean(held), [])

    def _blocks(self) -> tuple[str, list[FoundCall]]:
        said = ""
        calls: list[FoundCall] = []
        while (start := self._held.find(_OPEN)) >= 0:
            said += self._clean(self._held[:start])
            self._held = self._held[start:]
            end = self._held.find(_CLOSE)
            if end < 0:
                return said, self._allowed(calls)
            block, self._held = self._held[len(_OPEN) : end], self._held[end + len(_CLOSE) :]
            call = self._offered.call(parsed(block))
            if call is None:
                said += _OPEN + block + _CLOSE
            else:
                calls.append(call)
                self._held = self._held.lstrip()
                self._is_after_call = not self._held
        return said + self._said(_OPEN), self._allowed(calls)

    def _list(self, text: str) -> list[FoundCall]:
        """Read one call or a list of them; all must be good."""
        tree = parsed(text)
        if tree is None and self._family == "llama3":
            tree = [parsed(part) for part in text.split(";")]
        elif tree is None:  # newer Mistral: each call has its mark, then name[ARGS]{...}
            parts = [part.partition(_ARGS) for part in text.split(_MISTRAL)]
            tree = [{"name": name.strip(), "arguments": parsed(rest)} for name, _, rest in parts]
        found = [self._offered.call(item) for item in (tree if isinstance(tree, list) else [tree])]
        return [call for call in found if call is not None] if None not in found else []

    def _said(self, mark: str) -> str:
        """Return what cannot be the beginning of a call any more."""
        held = self._held
        sizes = range(min(len(mark) - 1, len(held)), 0, -1)
        keep = len(held) - next((n for n in sizes if mark.startswith(held[-n:])), 0)
        said, self._held = held[:keep], held[keep:]
        self._has_begun = self._has_begun or bool(said.strip())
        return self._clean(said)

    def _clean(self, text: str) -> str:
        for control in self._controls:
            text = text.replace(control, "")
        return text

    def _allowed(self, calls: list[FoundCall]) -> list[FoundCall]:
        room = len(calls) if self._is_parallel else max(0, 1 - self.num_calls)
        taken = calls[:room]
        self.num_calls += len(taken)
        return taken


def _validator(name: str, schema: Mapping[str, Any]) -> Any:
    """Return a validator that reads no reference from outside and runs no pattern."""
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import extend
        from referencing import Registry
    except ImportError:
        raise MissingExtraError("jsonschema", "serve", "calling tools") from None

    try:
        Draft202012Validator.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        reason = getattr(error, "message", "it is nested too deeply")
        raise Refusal(
            400, f"tools: the parameters of '{name}' are no JSON Schema: {reason}", param="tools"
        ) from None
    # a pattern of a stranger may take for ever on the model's words
    plain = extend(Draft202012Validator, {"pattern": None, "patternProperties": None})
    return plain(schema, registry=Registry())
