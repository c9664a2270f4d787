"""`/v1/completions`: texts that are continued as they are, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fedllm.serving import logprobs, replies
from fedllm.serving.conversing import check_stream, usage_of, wish_of
from fedllm.serving.exchange import Inbox, News
from fedllm.serving.generation import Generation, Piece
from fedllm.serving.host import Host
from fedllm.serving.requests import CompletionRequest


class Continuation:
    """One request for continuations of one or more texts.

    Args:
        host: What answers.
        request: What is asked.
        name: Id of the answer.
        created: When it was asked, seconds since 1970.

    Raises:
        Refusal: If it cannot be answered.
    """

    def __init__(self, host: Host, request: CompletionRequest, name: str, created: int) -> None:
        self._host, self._request = host, request
        self._head = {"id": name, "created": created, "model": request.model}
        check_stream(request)
        prompt = request.prompt
        self._texts = [prompt] if isinstance(prompt, str) else prompt
        self._group: list[Generation] = []
        self._prompt_tokens = 0

    def prepare(self, inbox: Inbox) -> Sequence[Generation]:
        """Return the sequences to run; may take a while, but touches nothing that is shared."""
        request = self._request
        wish = wish_of(request, request.max_tokens, request.logprobs)
        for text in self._texts:
            prompt = self._host.text_prompt(text)
            self._prompt_tokens += len(prompt)
            for i in range(request.n or 1):
                tell = inbox.slot(len(self._group))
                self._group.append(self._host.generation(request.model, prompt, wish, tell, i))
        return self._group

    async def whole(self, stream: AsyncIterator[News]) -> replies.TextCompletion:
        """Return the answer when all of it is there."""
        found: list[list[Piece]] = [[] for _ in self._group]
        async for index, piece in stream:
            found[index].append(piece)
        choices = [self._choice(i, pieces) for i, pieces in enumerate(found)]
        usage = usage_of(self._prompt_tokens, self._group)
        return replies.TextCompletion(**self._head, choices=choices, usage=usage)

    async def chunks(self, stream: AsyncIterator[News]) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer chunk by chunk."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        head = {**self._head, "object": "text_completion"}
        offsets = [0] * len(self._group)
        try:
            async for index, piece in stream:
                choice = {
                    "index": index,
                    "text": piece.text,
                    "logprobs": self._logprobs([piece], offsets[index]),
                    "finish_reason": piece.finish,
                }
                offsets[index] += len(piece.text)
                chunk = {**head, "choices": [choice]}
                yield {**chunk, "usage": None} if with_usage else chunk
            if with_usage:
                usage = usage_of(self._prompt_tokens, self._group).model_dump()
                yield {**head, "choices": [], "usage": usage}
        finally:
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator

    def _choice(self, index: int, pieces: Sequence[Piece]) -> replies.TextChoice:
        found = self._logprobs(pieces, 0)
        return replies.TextChoice(
            index=index,
            text="".join(piece.text for piece in pieces),
            logprobs=None if found is None else replies.TextLogprobs(**found),
            finish_reason=pieces[-1].finish or "stop",
        )

    def _logprobs(self, pieces: Sequence[Piece], start: int) -> dict[str, Any] | None:
        top = self._request.logprobs
        if top is None:
            return None
        choices = [choice for piece in pieces for choice in piece.choices]
        return logprobs.of_text(choices, self._host.spell, start, top).model_dump()
