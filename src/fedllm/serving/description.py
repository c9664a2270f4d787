"""The server's own OpenAPI description: what it says is what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.serving.replies import ErrorBody

_WORDS = {
    400: "The request is wrong; the message says what.",
    401: "A key is needed, or is wrong.",
    404: "There is no such model.",
    413: "The request is too large.",
    429: "Too many requests are waiting.",
    500: "Something went wrong with this request.",
    503: "The server stops, or its memory did not suffice.",
}


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of error answers."""
    return {
        status: {
            "description": _WORDS[status],
            "content": {"application/json": {"schema": ErrorBody.model_json_schema()}},
        }
        for status in statuses
    }


def streamed() -> dict[int | str, dict[str, Any]]:
    """Return the description of answers that may also come as server-sent events."""
    event = {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        "required": ["data"],
    }
    return {200: {"content": {"text/event-stream": {"schema": event}}}}


def completed(tree: dict[str, Any], names: Sequence[str], *, needs_key: bool) -> dict[str, Any]:
    """Return FastAPI's description without what this server does otherwise.

    Args:
        tree: FastAPI's own; modified.
        names: The models that can be asked.
        needs_key: Whether keys are asked for.
    """
    schemas = tree.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"]["model"]["enum"] = list(names)
    if needs_key:
        scheme = {"type": "http", "scheme": "bearer"}
        tree.setdefault("components", {})["securitySchemes"] = {"key": scheme}
    for path, operations in tree["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if needs_key and path != "/health":
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = {
                    "description": _WORDS[401],
                    "content": _error_content(operation["responses"]),
                }
    return tree


def _error_content(responses: Mapping[str, Any]) -> Any:
    return next(
        (r["content"] for status, r in responses.items() if status >= "400"),
        {"application/json": {"schema": ErrorBody.model_json_schema()}},
    )
