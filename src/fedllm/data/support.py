"""What a chat template writes beside roles and contents, found out by trying it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedllm.data.rows import Message
from fedllm.data.template import FIXED, Tokenizer
from fedllm.data.turns import Tools, Turn
from fedllm.errors import DataError

_TOOL, _CALLED, _THOUGHT = "probe_tool", "probe_call", "probe thought"
_REMEDY = (
    "Set model.chat_template to one that does: chatml, llama3, plain, or a .jinja file of the "
    "model's family"
)


@dataclass(frozen=True)
class Support:
    """One template's abilities; each is tried when it is first asked for."""

    tokenizer: Tokenizer
    template: str

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the functions that may be called are written."""
        return _TOOL in self._tried([_user()], _tools())

    @cached_property
    def writes_calls(self) -> bool:
        """Whether an assistant's tool calls are written."""
        return self._has_call(None)

    @cached_property
    def writes_calls_of_tools(self) -> bool:
        """Whether they are where tools are written, too: some have a template for each."""
        return self._has_call(_tools())

    @cached_property
    def wants_short_ids(self) -> bool:
        """Whether a call needs an id of nine letters or digits, as Mistral's templates ask."""
        return any(
            not self._tried(_calling("call_of_22_characters"), tools)
            and bool(self._tried(_calling("call00001"), tools))
            for tools in (None, _tools())
        )

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether `reasoning_content` of the last answer is written."""
        answer = {"role": "assistant", "content": "?", "reasoning_content": _THOUGHT}
        return _THOUGHT in self._tried([_user(), answer])

    def check(self, messages: Sequence[Message], tools: Tools, where: str) -> None:
        """Raise DataError if the template would leave tools or tool calls out."""
        if tools and not self.writes_tools:
            raise DataError(
                f"{where}: there are tools, but the chat template writes none. {_REMEDY}"
            )
        written = self.writes_calls_of_tools if tools else self.writes_calls
        if any(m.tool_calls for m in messages) and not written:
            raise DataError(
                f"{where}: there are tool calls, but the chat template writes none. {_REMEDY}"
            )

    def _has_call(self, tools: list[dict[str, Any]] | None) -> bool:
        tried = self._tried(_calling("call00001"), tools) or self._tried(_calling(None), tools)
        return _CALLED in tried

    def _tried(self, turns: list[Turn], tools: list[dict[str, Any]] | None = None) -> str:
        """Return what the template makes of it; nothing if it refuses."""
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tools=tools, chat_template=self.template, tokenize=False, **FIXED
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return ""


def _tools() -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {}}
    schema = {"name": _TOOL, "description": "a probe", "parameters": parameters}
    return [{"type": "function", "function": schema}]


def _user() -> Turn:
    return {"role": "user", "content": "?"}


def _calling(call_id: str | None) -> list[Turn]:
    call: Turn = {"type": "function", "function": {"name": _CALLED, "arguments": {}}}
    if call_id is not None:
        call = {"id": call_id, **call}
    return [_user(), {"role": "assistant", "content": "", "tool_calls": [call]}]
