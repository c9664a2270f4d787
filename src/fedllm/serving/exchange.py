"""From the engine's thread to the event loop: the answers of one request, as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fedllm.serving.generation import Generation, Piece
from fedllm.serving.host import Host
from fedllm.serving.refusals import Refusal

News = tuple[int, Piece]
"""Which of the answers of a request, and what is new of it."""


class Inbox:
    """Where the engine leaves the news of one request; made on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[News] = asyncio.Queue()

    def slot(self, index: int) -> Callable[[Piece], None]:
        """Return what the engine tells the news of one answer to."""

        def tell(piece: Piece) -> None:
            # a loop that has ended has nobody left to tell
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return tell

    async def get(self) -> News:
        """Wait for news."""
        return await self._queue.get()


async def news(host: Host, group: Sequence[Generation], inbox: Inbox) -> AsyncIterator[News]:
    """Submit sequences and yield what comes; whoever stops listening cancels them.

    Raises:
        Refusal: If they are not taken, or one fails on its way.
    """
    host.scheduler.submit(group)
    left = len(group)
    try:
        while left:
            index, piece = await inbox.get()
            if piece.error is not None:
                raise piece.error
            left -= piece.is_last
            yield index, piece
    finally:
        for one in group:
            one.cancel()


async def primed(stream: AsyncIterator[News]) -> AsyncIterator[News]:
    """Wait for the first news, so that what fails at once is refused with an HTTP status.

    Raises:
        Refusal: If there is none.
    """
    first = await anext(stream)

    async def rest() -> AsyncIterator[News]:
        try:
            yield first
            async for item in stream:
                yield item
        finally:
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator

    return rest()


async def events(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    """Write chunks as server-sent events; an error becomes the last one."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except Refusal as refusal:
        yield _event(refusal.body)
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]  # it is a generator


def _event(tree: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(tree, ensure_ascii=False).encode() + b"\n\n"
