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
        schema = {
            "name": _TOOL,
            "description": "a probe",
            "parameters": {"type": "object", "properties": {}},
        }
        tools = [{"type": "function", "function": schema}]
        return _TOOL in self._tried([_user()], tools)

    @cached_property
    def writes_calls(self) -> bool:
        """Whether an assistant's tool calls are written."""
        return _CALLED in (self._tried(_calling("call00001")) or self._tried(_calling(None)))

    @cached_property
    def wants_short_ids(self) -> bool:
        """Whether a call needs an id of nine letters or digits, as Mistral's templates ask."""
        return not self._tried(_calling("call_of_22_characters")) and bool(
            self._tried(_calling("call00001"))
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
        if any(m.tool_calls for m in messages) and not self.writes_calls:
            raise DataError(
                f"{where}: there are tool calls, but the chat template writes none. {_REMEDY}"
            )

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


def _user() -> Turn:
    return {"role": "user", "content": "?"}


def _calling(call_id: str | None) -> list[Turn]:
    call: Turn = {"type": "function", "function": {"name": _CALLED, "arguments": {}}}
    if call_id is not None:
        call = {"id": call_id, **call}
    return [_user(), {"role": "assistant", "content": "", "tool_calls": [call]}]
