"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping

from fedllm.serving.generation import Generation
from fedllm.serving.scheduler import Scheduler

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of times to the first token."""


class Figures:
    """Counts; may be added to from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._asked: Counter[str] = Counter()
        self._buckets = [0] * (len(BOUNDS_S) + 1)
        self._waited_s = 0.0
        self._totals: Counter[str] = Counter()

    def request(self, path: str, status: int) -> None:
        """Count an answered HTTP request."""
        with self._lock:
            self._requests[path, status] += 1

    def asked(self, model: str, count: int) -> None:
        """Count the answers asked of a model."""
        with self._lock:
            self._asked[model] += count

    def over(self, one: Generation) -> None:
        """Count a sequence that is over, however it ended."""
        with self._lock:
            self._totals["cancelled"] += one.is_cancelled
            if one.first_s is None:
                return
            self._totals["prompt"] += len(one.prompt)
            self._totals["new"] += len(one.tokens)
            waited_s = one.first_s - one.asked_s
            self._waited_s += waited_s
            self._buckets[sum(waited_s > bound for bound in BOUNDS_S)] += 1

    def text(self, scheduler: Scheduler) -> str:
        """Return everything, one figure a line."""
        with self._lock:
            return "\n".join(self._lines(scheduler)) + "\n"

    def _lines(self, scheduler: Scheduler) -> Iterator[str]:
        yield "# TYPE fedllm_requests_total counter"
        for (path, status), count in sorted(self._requests.items()):
            yield _line("fedllm_requests_total", count, {"path": path, "status": str(status)})
        yield "# TYPE fedllm_answers_total counter"
        for model, count in sorted(self._asked.items()):
            yield _line("fedllm_answers_total", count, {"model": model})
        for name, key in (("prompt_tokens", "prompt"), ("generated_tokens", "new")):
            yield f"# TYPE fedllm_{name}_total counter"
            yield _line(f"fedllm_{name}_total", self._totals[key])
        yield "# TYPE fedllm_cancelled_total counter"
        yield _line("fedllm_cancelled_total", self._totals["cancelled"])
        gauges = {
            "queue_length": scheduler.waiting,
            "running": scheduler.running,
            "kv_bytes": scheduler.kv_bytes,
            "kv_limit_bytes": scheduler.limits.kv_bytes,
        }
        for name, value in gauges.items():
            yield f"# TYPE fedllm_{name} gauge"
            yield _line(f"fedllm_{name}", value)
        yield from self._histogram()

    def _histogram(self) -> Iterator[str]:
        name = "fedllm_time_to_first_token_seconds"
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self._buckets, strict=True):
            total += count
            yield _line(f"{name}_bucket", total, {"le": bound})
        yield _line(f"{name}_sum", self._waited_s)
        yield _line(f"{name}_count", total)


def _line(name: str, value: float, labels: Mapping[str, str] | None = None) -> str:
    inside = ",".join(f'{key}="{text}"' for key, text in (labels or {}).items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"
