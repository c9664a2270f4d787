"""The HTTP interface: OpenAI's paths, and two for operators."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import fedllm
from fedllm.errors import did_you_mean, unknown
from fedllm.serving import replies
from fedllm.serving.continuing import Continuation
from fedllm.serving.conversing import Conversation
from fedllm.serving.description import completed, refused, streamed
from fedllm.serving.exchange import Inbox, events, news, primed
from fedllm.serving.figures import Figures
from fedllm.serving.gate import Gate
from fedllm.serving.host import Host
from fedllm.serving.keys import Keys
from fedllm.serving.refusals import Refusal, broken
from fedllm.serving.requests import ChatRequest, CompletionRequest

log = logging.getLogger("fedllm.serving")

_ANSWERS = refused(400, 404, 413, 429, 500, 503)
_EXTRA = "extra_forbidden"


@dataclass(frozen=True)
class Bounds:
    """How large a request may be."""

    max_body_bytes: int = 2**21
    max_messages: int = 512


def make_app(host: Host, keys: Keys, figures: Figures, bounds: Bounds | None = None) -> Gate:
    """Return the ASGI application; its lifespan starts and ends the engine."""
    bounds = bounds or Bounds()
    api = FastAPI(
        title="FedLLM-Factory",
        version=fedllm.__version__,
        lifespan=_lifespan(host),
        docs_url=None,
        redoc_url=None,
    )
    _add_models(api, host)
    _add_answers(api, host, figures, bounds)
    _add_operators(api, host, figures)
    _add_errors(api)
    plain = api.openapi
    is_described: list[dict[str, Any]] = []

    def described() -> dict[str, Any]:
        if not is_described:
            is_described.append(completed(plain(), host.names, needs_key=bool(keys)))
        return is_described[0]

    api.openapi = described  # type: ignore[method-assign]  # FastAPI's way to change it
    known = tuple(described()["paths"])
    return Gate(api, keys, figures, bounds.max_body_bytes, known)


def _lifespan(host: Host) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        host.scheduler.start()
        yield
        await asyncio.to_thread(host.scheduler.close)

    return run


def _add_models(api: FastAPI, host: Host) -> None:
    created = int(time.time())
    cards = {n: replies.ModelCard(id=n, created=created, owned_by="fedllm") for n in host.names}

    @api.get("/v1/models")
    async def list_models() -> replies.ModelList:
        """Name the models that can be asked."""
        return replies.ModelList(data=list(cards.values()))

    @api.get("/v1/models/{model}", responses=refused(404))
    async def find_model(model: str) -> replies.ModelCard:
        """Describe one model."""
        if model not in cards:
            message = unknown("model", model, cards)
            raise Refusal(404, message, code="model_not_found", param="model")
        return cards[model]


def _add_answers(api: FastAPI, host: Host, figures: Figures, bounds: Bounds) -> None:
    @api.post(
        "/v1/chat/completions",
        response_model=replies.ChatCompletion,
        responses={**_ANSWERS, **streamed()},
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        if len(body.messages) > bounds.max_messages:
            message = f"a conversation may have {bounds.max_messages} messages at most"
            raise Refusal(413, message, code="too_many_messages", param="messages")
        made = Conversation(host, body, "chatcmpl-" + secrets.token_hex(12), int(time.time()))
        figures.asked(_known(host, body.model), body.n or 1)
        return await _answered(host, made, request, is_stream=bool(body.stream))

    @api.post(
        "/v1/completions",
        response_model=replies.TextCompletion,
        responses={**_ANSWERS, **streamed()},
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        made = Continuation(host, body, "cmpl-" + secrets.token_hex(12), int(time.time()))
        figures.asked(_known(host, body.model), body.n or 1)
        return await _answered(host, made, request, is_stream=bool(body.stream))


def _known(host: Host, model: str) -> str:
    """Return a model's name; one that does not exist is refused before anything is done.

    Raises:
        Refusal: If there is none.
    """
    if model not in host.rows:
        message = unknown("model", model, host.rows)
        raise Refusal(404, message, code="model_not_found", param="model")
    return model


async def _answered(
    host: Host, made: Conversation | Continuation, request: Request, *, is_stream: bool
) -> Response:
    """Run a request to its end, or until whoever asked has left."""
    inbox = Inbox()
    group = await asyncio.to_thread(made.prepare, inbox)
    stream = await _unless_gone(request, primed(news(host, group, inbox)))
    if is_stream:
        return StreamingResponse(events(made.chunks(stream)), media_type="text/event-stream")
    whole = await _unless_gone(request, made.whole(stream))
    return JSONResponse(replies.dumped(whole))


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Wait for work, but give it up when the client leaves.

    Raises:
        Refusal: If it has left (nobody reads this).
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client has closed the connection")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_operators(api: FastAPI, host: Host, figures: Figures) -> None:
    @api.get("/health")
    async def health() -> replies.Health:
        """Say how the server is."""
        engine = host.scheduler
        return replies.Health(
            status="ok",
            running=engine.running,
            waiting=engine.waiting,
            kv_bytes=engine.kv_bytes,
            kv_limit_bytes=engine.limits.kv_bytes,
        )

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Return figures for Prometheus."""
        text = figures.text(host.scheduler)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(Refusal)
    async def refusal(request: Request, error: Refusal) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = list(error.errors())
        return JSONResponse(_faulty(faults).body, 400)

    @api.exception_handler(HTTPException)
    async def wrong_path(request: Request, error: HTTPException) -> JSONResponse:
        found = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(found.body, error.status_code, dict(error.headers or {}))

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse(broken().body, 500)


def _faulty(faults: Sequence[Any]) -> Refusal:
    """Return one refusal that names every fault of a body."""
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    sentences = []
    for fault in faults:
        where = ".".join(str(part) for part in fault["loc"][1:]) or "body"
        if fault["type"] == _EXTRA:
            hint = did_you_mean(str(fault["loc"][-1]), fields).replace(" Did", " (did")
            hint = hint.replace("?", "?)")
            sentences.append(f"'{where}' is not supported, leave it out{hint}")
        elif fault["type"] == "json_invalid":
            sentences.append("the body is not JSON")
        else:
            sentences.append(f"{where}: {fault['msg']}")
    param = ".".join(str(part) for part in faults[0]["loc"][1:]) or None
    return Refusal(400, "; ".join(dict.fromkeys(sentences)), param=param)
