"""What a server says no with: an HTTP status and an error in the shape of OpenAI's."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class Refusal(Exception):
    """A request that is not, or no longer, served.

    Args:
        status: HTTP status.
        message: What is wrong and how to mend it.
        code: OpenAI's word for it, if there is one.
        param: The field that is wrong.
        retry_after_s: When to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What goes beside the body."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(self.retry_after_s)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def full(waiting: int, retry_after_s: int = 1) -> Refusal:
    """Refuse because too many are waiting."""
    return Refusal(
        429,
        f"{waiting} requests are waiting already; try again later",
        code="queue_full",
        retry_after_s=retry_after_s,
    )


def out_of_memory() -> Refusal:
    """Give up on a request that memory did not suffice for."""
    return Refusal(
        503,
        "the memory did not suffice for this request; try again, or ask for fewer tokens",
        code="out_of_memory",
        retry_after_s=1,
    )


def broken() -> Refusal:
    """Give up on a request that something unforeseen went wrong with."""
    return Refusal(500, "something went wrong with this request; the server's log says what")
