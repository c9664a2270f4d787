"""Where and when jobs are computed; what comes of them does not depend on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from fedllm.config.section import Section


class ExecutionConfig(Section):
    """Processes, and when they work."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that train, each with a base model of its own; 0 trains in this one. Results are
    the same up to the rounding of floating-point sums, and the same bit for bit for the same
    number."""
    threads_per_worker: PositiveInt | None = None
    """Threads of each worker; absent: the cores, divided among them."""
    compute: Literal["lazy", "eager"] = "lazy"
    """`lazy` computes jobs together, when the first of their results is needed; `eager` each by
    itself when it is given out."""
    lost: Literal["skip", "compute"] = "skip"
    """What happens to jobs that are certain to be lost: nothing, or they are computed all the
    same, for checking; no result depends on it."""
