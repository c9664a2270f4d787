"""The bodies of answers in OpenAI's shape."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Part(BaseModel):
    """The base of all parts of an answer."""

    model_config = ConfigDict(extra="forbid")


class Usage(Part):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Part):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and what else was likely."""

    top_logprobs: list[TopLogprob]


class Logprobs(Part):
    """Of the tokens of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Part):
    """A function with its arguments, a JSON object."""

    name: str
    arguments: str


class ToolCall(Part):
    """A call that the assistant asks for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Part):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Part):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(Part):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Part):
    """Of the tokens of a text, in the older shape."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Part):
    """One continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Part):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Part):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(Part):
    """All models that can be asked."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Part):
    """How the server is."""

    status: Literal["ok", "stopping"]
    running: int
    waiting: int
    kv_bytes: int
    kv_limit_bytes: int


class ErrorDetail(Part):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Part):
    """Every answer that is none."""

    error: ErrorDetail


def dumped(part: Part) -> dict[str, Any]:
    """Return an answer as JSON values; an answer without calls has no key for them."""
    tree = part.model_dump()
    for choice in tree.get("choices", ()):
        message = choice.get("message")
        if message is not None and message["tool_calls"] is None:
            del message["tool_calls"]
    return tree
