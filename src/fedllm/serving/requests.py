"""The bodies of requests in OpenAI's shape; what is not known here is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_STOPS, MAX_CHOICES, MAX_TOP, MAX_TOOLS = 4, 16, 20, 128


def _whole(value: Any) -> Any:
    """Take 8.0 for the integer that JSON says it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[TokenId, Bias],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """The base of all parts of a request: JSON's own types, and no key that is not known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A part of a message; texts are all that is understood."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Body):
    """What the assistant is told of its task."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    """The function that an assistant called."""

    name: Name
    arguments: str
    """A JSON object."""


class Call(Body):
    """A call that an assistant made before."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Body):
    """What the assistant said before."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: None = None
    name: str | None = None
    tool_calls: Annotated[list[Call], Field(min_length=1)] | None = None


class ToolMessage(Body):
    """What a function that was called has returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=128)]


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Body):
    """A function that the assistant may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of its arguments."""
    strict: Literal[False] | None = None


class Tool(Body):
    """A tool; functions are all there are."""

    type: Literal["function"]
    function: Function


class StreamOptions(Body):
    """What a stream brings besides text."""

    include_usage: bool | None = None


class TextFormat(Body):
    """Answers are text; other formats cannot be promised."""

    type: Literal["text"]


class Asked(Body):
    """What both kinds of request have."""

    model: str
    """One of those that `/v1/models` names."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100000), WHOLE] | None = None
    """Not in OpenAI's interface: draw among this many tokens; 0 means all."""
    ignore_eos: bool | None = None
    """Not in OpenAI's interface: go on after the end of the turn, for measurements."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    stop: Stop | Stops | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Not used."""


class ChatRequest(Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    """`required` and a named function are refused: no model can be made to call."""
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Not used."""
    service_tier: Literal["auto", "default"] | None = None


class CompletionRequest(Asked):
    """The body of `/v1/completions`."""

    prompt: (
        Annotated[str, StringConstraints(min_length=1)]
        | Annotated[
            list[Annotated[str, StringConstraints(min_length=1)]],
            Field(min_length=1, max_length=64),
        ]
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    suffix: None = None
