"""`/v1/chat/completions`: from a request to prompts, and from what is written to its answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.data.rows import Message, ToolCall
from fedllm.serving import logprobs, replies
from fedllm.serving.exchange import Inbox, News
from fedllm.serving.generation import Generation, Piece
from fedllm.serving.host import Host, Wish
from fedllm.serving.refusals import Refusal
from fedllm.serving.requests import Asked, AssistantMessage, ChatRequest, Content, ToolMessage
from fedllm.serving.tool_calls import CallReader, FoundCall, Offered, family_of


@dataclass
class _Spoken:
    """One of the answers, as far as it has come."""

    reader: CallReader | None
    text: str = ""
    calls: list[FoundCall] = field(default_factory=list)
    logprobs: list[replies.TokenLogprob] = field(default_factory=list)
    finish: replies.FinishReason = "stop"

    def take(self, piece: Piece) -> tuple[str, list[FoundCall]]:
        """Add what is new; return the text and the calls that it brings."""
        text = piece.text
        calls: list[FoundCall] = []
        if self.reader is not None:
            text, calls = self.reader.feed(piece.text)
            if piece.is_last:
                rest, more = self.reader.finish()
                text, calls = text + rest, [*calls, *more]
        self.text += text
        self.calls += calls
        if piece.finish is not None:
            self.finish = "tool_calls" if self.calls else piece.finish
        return text, calls


class Conversation:
    """One request for answers to a conversation.

    Args:
        host: What answers.
        request: What is asked.
        name: Id of the answer.
        created: When it was asked, seconds since 1970.

    Raises:
        Refusal: If it cannot be answered.
    """

    def __init__(self, host: Host, request: ChatRequest, name: str, created: int) -> None:
        self._host, self._request = host, request
        self._head = {"id": name, "created": created, "model": request.model}
        self._count = request.n or 1
        if request.top_logprobs is not None and not request.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        check_stream(request)
        self._tools = [] if request.tool_choice == "none" else list(request.tools or ())
        self._family = family_of(host.renderer.template) if self._tools else None
        if self._tools and self._family is None:
            raise Refusal(
                400,
                "tools: it is not known how models with this chat template write calls. Known are"
                " those of Qwen, Llama 3 and Mistral",
                param="tools",
            )
        self._offered = Offered({t.function.name: t.function.parameters or {} for t in self._tools})
        self._spoken = [_Spoken(self._reader()) for _ in range(self._count)]
        self._group: list[Generation] = []

    def prepare(self, inbox: Inbox) -> Sequence[Generation]:
        """Return the sequences to run; may take a while, but touches nothing that is shared."""
        request = self._request
        tools = [tool.model_dump(exclude_none=True) for tool in self._tools]
        prompt = self._host.prompt([_message(m) for m in request.messages], tools)
        limit = request.max_completion_tokens or request.max_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
        wish = wish_of(request, limit, top, keeps_controls=bool(self._tools))
        self._group = [
            self._host.generation(request.model, prompt, wish, inbox.slot(i), i)
            for i in range(self._count)
        ]
        return self._group

    async def whole(self, stream: AsyncIterator[News]) -> replies.ChatCompletion:
        """Return the answer when all of it is there."""
        async for index, piece in stream:
            spoken = self._spoken[index]
            spoken.take(piece)
            spoken.logprobs += self._logprobs(piece)
        choices = [self._choice(i, spoken) for i, spoken in enumerate(self._spoken)]
        return replies.ChatCompletion(**self._head, choices=choices, usage=self._usage())

    async def chunks(self, stream: AsyncIterator[News]) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer chunk by chunk."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        try:
            for index in range(self._count):
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, with_usage)
            async for index, piece in stream:
                spoken = self._spoken[index]
                before = len(spoken.calls)
                text, calls = spoken.take(piece)
                found = self._logprobs(piece)
                if text or found:
                    delta = {"content": text}
                    yield self._chunk(index, delta, None, with_usage, found)
                for number, call in enumerate(calls, start=before):
                    delta_call = {"index": number, **_call(call).model_dump()}
                    yield self._chunk(index, {"tool_calls": [delta_call]}, None, with_usage)
                if piece.is_last:
                    yield self._chunk(index, {}, spoken.finish, with_usage)
            if with_usage:
                head = {**self._head, "object": "chat.completion.chunk"}
                yield {**head, "choices": [], "usage": self._usage().model_dump()}
        finally:
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator

    def _reader(self) -> CallReader | None:
        if self._family is None:
            return None
        return CallReader(
            self._family,
            self._offered,
            self._host.renderer.controls,
            is_parallel=self._request.parallel_tool_calls is not False,
        )

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None,
        with_usage: bool,
        found: list[replies.TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        probabilities = {"content": [one.model_dump() for one in found]} if found else None
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": probabilities,
            "finish_reason": finish,
        }
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if with_usage else chunk

    def _choice(self, index: int, spoken: _Spoken) -> replies.ChatChoice:
        calls = [_call(call) for call in spoken.calls]
        text = spoken.text.strip() if calls else spoken.text
        found = replies.Logprobs(content=spoken.logprobs) if self._request.logprobs else None
        message = replies.AnswerMessage(
            content=None if calls and not text else text, tool_calls=calls or None
        )
        return replies.ChatChoice(
            index=index, message=message, logprobs=found, finish_reason=spoken.finish
        )

    def _logprobs(self, piece: Piece) -> list[replies.TokenLogprob]:
        top = self._request.top_logprobs or 0
        return logprobs.of_message(piece.choices, self._host.spell, top)

    def _usage(self) -> replies.Usage:
        return usage_of(len(self._group[0].prompt), self._group)


def usage_of(prompt_tokens: int, group: Sequence[Generation]) -> replies.Usage:
    """Return what a request has cost."""
    new = sum(len(one.tokens) for one in group)
    return replies.Usage(
        prompt_tokens=prompt_tokens, completion_tokens=new, total_tokens=prompt_tokens + new
    )


def wish_of(
    request: Asked, limit: int | None, top: int | None, *, keeps_controls: bool = False
) -> Wish:
    """Return what a request asks of the sampling."""
    stop = request.stop if request.stop is not None else []
    return Wish(
        max_tokens=limit,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        seed=request.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        top_logprobs=top,
        keeps_controls=keeps_controls,
        ignores_end=bool(request.ignore_eos),
    )


def check_stream(request: Asked) -> None:
    """Refuse options of a stream where there is none.

    Raises:
        Refusal: As OpenAI does.
    """
    if request.stream_options is not None and not request.stream:
        raise Refusal(400, "stream_options needs stream: true", param="stream_options")


def _call(call: FoundCall) -> replies.ToolCall:
    function = replies.CalledFunction(name=call.name, arguments=call.arguments)
    return replies.ToolCall(id=call.id, function=function)


def _message(message: Any) -> Message:
    """Return a message of a request as data sets have it."""
    text = _text(message.content)
    if isinstance(message, ToolMessage):
        return Message("tool", text, tool_call_id=message.tool_call_id)
    if isinstance(message, AssistantMessage):
        calls = tuple(
            ToolCall(c.function.name, _arguments(c.function.arguments), c.id)
            for c in message.tool_calls or ()
        )
        return Message("assistant", text, calls)
    return Message("user" if message.role == "user" else "system", text)


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _arguments(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise Refusal(
            400, "messages: the arguments of a tool call must be a JSON object", param="messages"
        )
    return tree
