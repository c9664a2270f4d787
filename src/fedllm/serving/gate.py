"""What every request passes: its id, its key, its size, and a line in the log without its words."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fedllm.serving.figures import Figures
from fedllm.serving.keys import Keys
from fedllm.serving.refusals import Refusal

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health",)
"""What may be read without a key: whether the server lives, and no name of anything."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

log = logging.getLogger("fedllm.serving")


class Gate:
    """An ASGI application around another.

    Args:
        app: What answers requests that pass.
        keys: Who may ask.
        figures: Where requests are counted.
        max_body_bytes: Largest body.
        known: The paths that are counted by their names.
    """

    def __init__(
        self, app: App, keys: Keys, figures: Figures, max_body_bytes: int, known: tuple[str, ...]
    ) -> None:
        self._app, self._keys, self._figures = app, keys, figures
        self._max_body_bytes, self._known = max_body_bytes, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else "req_" + secrets.token_hex(12)
        began_s, status, holder = time.perf_counter(), 500, None

        async def marked(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                extra = (b"x-request-id", request_id.encode())
                event = {**event, "headers": [*event.get("headers", []), extra]}
            await send(event)

        try:
            holder = self._admitted(scope["path"], headers.get(b"authorization", b""))
            body = await self._body(receive, headers)
            await self._app(scope, _replayed(body, receive), marked)
        except Refusal as refusal:
            await _refuse(refusal, marked)
        finally:
            path = scope["path"] if scope["path"] in self._known else "other"
            self._figures.request(path, status)
            spent_s = time.perf_counter() - began_s
            words = (request_id, holder or "-", scope["method"], path, status, spent_s)
            log.info("%s %s %s %s %d %.3fs", *words)

    def _admitted(self, path: str, authorization: bytes) -> str | None:
        """Return whose key was given; None where none is needed."""
        if not self._keys or path in OPEN_PATHS:
            return None
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        holder = self._keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            what = "the API key is wrong" if authorization else "an API key is needed"
            raise Refusal(401, f"{what}; send 'Authorization: Bearer KEY'", code="invalid_api_key")
        return holder

    async def _body(self, receive: Receive, headers: MutableMapping[bytes, bytes]) -> bytes:
        """Read the whole body, but never more than is allowed."""
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._max_body_bytes:
            raise self._too_large()
        body = b""
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return body
            body += bytes(event.get("body", b""))
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not event.get("more_body"):
                return body

    def _too_large(self) -> Refusal:
        message = f"the body of a request may have {self._max_body_bytes} bytes at most"
        return Refusal(413, message, code="body_too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, then goes on."""
    is_given = False

    async def again() -> Event:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | refusal.headers).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
