"""uvicorn around the application: it says when it listens, and ends well when it is asked to."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn


class _Server(uvicorn.Server):
    """Calls back once it takes requests."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, then say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()


def listen(app: Any, listener: socket.socket, grace_s: int, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; running answers have `grace_s` seconds to end."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=grace_s,
        server_header=False,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn takes them over while it runs and raises them once more when it has ended
        signal.signal(number, lambda *_: None)
    _Server(config, ready).run(sockets=[listener])
