"""A server from its settings: checked, loaded, bound, and stopped without losing an answer."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedllm.errors import ConfigError, MissingExtraError
from fedllm.serving.keys import Keys
from fedllm.serving.sources import Source

if TYPE_CHECKING:
    from fedllm.serving.scheduler import Limits

Ready = Callable[[Sequence[str], str], None]


@dataclass(frozen=True)
class Address:
    """Where a server listens, and who may ask there."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=lambda: Keys({}))
    is_open: bool = False
    """Whether a public address without keys is meant."""

    def check(self) -> None:
        """Refuse to let strangers in by mistake.

        Raises:
            ConfigError: If the address is not this machine's own and there are no keys.
        """
        if self.keys or self.is_open or _is_loopback(self.host):
            return
        raise ConfigError(
            [
                f"{self.host} can be reached from other machines, and no key is asked for. Give"
                " --api-key-file FILE (lines of name:key), or --no-auth if everybody may ask"
            ]
        )


@dataclass(frozen=True)
class Terms:
    """What a server takes, and how it ends."""

    max_body_bytes: int = 2**21
    """Largest body of a request."""
    grace_s: int = 30
    """How long answers may take to end once the server is asked to stop."""


def serve(source: Source, address: Address, limits: Limits, terms: Terms, *, ready: Ready) -> None:
    """Load what is served, answer until SIGINT or SIGTERM, and let running answers end.

    Args:
        source: What is served.
        address: Where.
        limits: How much is taken on at once.
        terms: What is taken, and how it ends.
        ready: Called with the models' names and the address once requests are taken.

    Raises:
        ConfigError: If the address is public without keys, or taken.
        MissingExtraError: If FastAPI or uvicorn is not installed.
    """
    address.check()
    try:
        from fedllm.serving.app import Bounds, make_app
        from fedllm.serving.listening import listen
    except ImportError as error:
        raise MissingExtraError(error.name or "uvicorn", "serve", "fedllm serve") from None
    from fedllm.serving.figures import Figures
    from fedllm.serving.host import Host

    listener = _listener(address)
    figures = Figures()
    host = Host(source, limits, figures.over)
    app = make_app(host, address.keys, figures, Bounds(max_body_bytes=terms.max_body_bytes))
    listen(app, listener, terms.grace_s, lambda: ready(host.names, _url(listener)))


def _listener(address: Address) -> socket.socket:
    """Bind before anything is loaded, so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
    except OSError as error:
        listener.close()
        where = f"{address.host}:{address.port}"
        reason = error.strerror or str(error)
        raise ConfigError([f"cannot listen on {where}: {reason}. Choose another --port"]) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
