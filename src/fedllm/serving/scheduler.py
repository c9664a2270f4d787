"""The engine's thread: takes requests from a bounded queue and decodes them in one batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedllm.serving.batch import Batch
from fedllm.serving.generation import Generation
from fedllm.serving.refusals import Refusal, broken, full, out_of_memory
from fedllm.serving.sampling import Choice, choose

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much is taken on at once."""

    max_batch: int = 32
    """Sequences that are decoded together."""
    max_queue: int = 128
    """Sequences that wait; more are refused with 429."""
    kv_bytes: int = 2**30
    """What keys and values may take."""
    prefill_tokens: int = 2048
    """Most prompt tokens, padding included, that are run between two steps (or one prompt)."""


class Scheduler:
    """Decodes on a thread of its own; `submit` may be called from any.

    Args:
        batch: The model; used by this thread alone from now on.
        ends: Tokens that end an answer.
        limits: How much is taken on at once.
        told: Called with each sequence that is over, on this thread.
    """

    def __init__(
        self,
        batch: Batch,
        ends: Sequence[int],
        limits: Limits,
        told: Callable[[Generation], None] = lambda one: None,
    ) -> None:
        self._batch, self._ends, self.limits = batch, frozenset(ends), limits
        self._told = told
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="fedllm-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Refuse what waits or runs, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._batch.rows)

    @property
    def kv_bytes(self) -> int:
        """What keys and values take now."""
        return self._batch.cache.nbytes

    def submit(self, group: Sequence[Generation]) -> None:
        """Put sequences into the queue, all or none.

        Raises:
            Refusal: If the queue is full, the server stops, or one could never be run.
        """
        if len(group) > self.limits.max_queue:
            raise Refusal(
                413,
                f"{len(group)} answers are asked for at once, and {self.limits.max_queue} may"
                " wait; ask for fewer",
                code="too_many_answers",
                param="n",
            )
        for one in group:
            needed = one.size * self._batch.token_bytes
            if needed > self.limits.kv_bytes:
                raise Refusal(
                    413,
                    f"{len(one.prompt)} prompt tokens and {one.max_new_tokens} new ones need"
                    f" {needed} bytes of keys and values, and the server has"
                    f" {self.limits.kv_bytes}; shorten the prompt or lower max_tokens",
                    code="kv_memory_exceeded",
                )
        with self._changed:
            if self._is_closing:
                raise Refusal(503, "the server is stopping", code="stopping")
            if len(self._waiting) + len(group) > self.limits.max_queue:
                raise full(len(self._waiting))
            self._waiting.extend(group)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._batch.rows or self._is_closing):
                    self._changed.wait()
                if self._is_closing:
                    break
                joining = self._next()
            try:
                self._turn(joining)
            except Exception:
                # the thread serves everybody, so nothing that one request meets may end it
                log.exception("a batch failed")
                self._fail([*self._batch.rows, *joining], broken())
                self._batch.clear()
        stopping = Refusal(503, "the server is stopping", code="stopping")
        self._fail([*self._batch.rows, *self._waiting], stopping)
        self._batch.clear()

    def _next(self) -> list[Generation]:
        """Take from the queue, in its order, what fits beside the batch."""
        running = [row for row in self._batch.rows if not row.is_cancelled]
        count, widest = len(running), max((row.size for row in running), default=0)
        joining: list[Generation] = []
        longest = 0
        while self._waiting:
            one = self._waiting[0]
            if one.is_cancelled:
                self._drop(self._waiting.popleft())
                continue
            widest, longest = max(widest, one.size), max(longest, len(one.prompt))
            room = self.limits.kv_bytes // self._batch.token_bytes
            if count >= self.limits.max_batch or (count + 1) * widest > room:
                break
            if joining and longest * (len(joining) + 1) > self.limits.prefill_tokens:
                break
            joining.append(self._waiting.popleft())
            count += 1
        return sorted(joining, key=lambda one: one.adapter)

    def _turn(self, joining: list[Generation]) -> None:
        """Run the prompts of those that join, then one step of the batch."""
        for row in self._batch.rows:
            if row.is_cancelled:
                self._drop(row)
        self._batch.settle()
        if joining:
            self._join(joining)
        if self._batch.rows:
            self._step()

    def _join(self, joining: list[Generation]) -> None:
        try:
            logits, cache = self._batch.prefill(joining)
        except Exception as error:
            if len(joining) > 1:  # find out whose fault it is
                for one in joining:
                    self._join([one])
                return
            self._fail(joining, _refusal(error))
            return
        self._take(joining, logits)
        alive = [i for i, one in enumerate(joining) if not one.is_done]
        if len(alive) < len(joining):
            cache = cache.take(alive, range(len(alive)), cache, cache.used) if alive else cache
        if alive:
            self._batch.settle([joining[i] for i in alive], cache)

    def _step(self) -> None:
        try:
            logits = self._batch.step()
        except Exception as error:
            refusal = _refusal(error)
            if refusal.status != 503:
                raise
            # the largest makes room for the others
            self._fail([max(self._batch.rows, key=lambda row: row.length)], refusal)
            self._batch.settle()
            return
        self._take(self._batch.rows, logits)
        self._batch.settle()

    def _take(self, rows: Sequence[Generation], logits: torch.Tensor) -> None:
        for row, choice in zip(rows, self._chosen(rows, logits), strict=True):
            if choice is None:
                message = "the model's output is not finite for this request"
                self._fail([row], Refusal(500, message, code="not_finite"))
                continue
            try:
                row.take(choice, choice.token in self._ends and not row.ignores_end)
            except Exception:
                log.exception("an answer could not be written")
                self._fail([row], broken())
                continue
            if row.is_done:
                self._told(row)

    def _chosen(self, rows: Sequence[Generation], logits: torch.Tensor) -> list[Choice | None]:
        """Choose for all at once; if one fails, each alone, so that only that one is lost."""
        try:
            return choose(logits, rows)
        except Exception:
            found: list[Choice | None] = []
            for i, row in enumerate(rows):
                try:
                    found += choose(logits[i : i + 1], [row])
                except Exception:
                    log.exception("a token could not be chosen")
                    found.append(None)
            return found

    def _fail(self, rows: Sequence[Generation], refusal: Refusal) -> None:
        for row in rows:
            if not row.is_done:
                row.fail(refusal)
                self._told(row)

    def _drop(self, row: Generation) -> None:
        row.is_done = True
        self._told(row)


def _refusal(error: Exception) -> Refusal:
    text = str(error)
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and ("allocate memory" in text or "not enough memory" in text)
    )
    if is_memory:
        log.warning("out of memory: %s", text.partition("\n")[0])
        return out_of_memory()
    log.error("a request failed", exc_info=error)
    return broken()
