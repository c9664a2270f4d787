"""Late updates, in today's coordinates (being written)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedllm.federation.base import BaseServer
from fedllm.federation.messages import Job, Part


def fresh_parts(
    server: BaseServer, parts: Sequence[Part], jobs: Mapping[int, Job], *, is_change: bool
) -> list[Part]:
    """Return what is aggregated."""
    return list(parts)
