"""Events, client states, and the queue that is the virtual clock. No torch here."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum


class EventKind(IntEnum):
    """What can happen. At one instant windows open first: who begins together, trains together.

    What is done at the instant at which a window closes is done in time.
    """

    WINDOW_OPEN = 0
    TRAINING_DONE = 1
    UPLOAD_DONE = 2
    WINDOW_CLOSE = 3


class ClientState(Enum):
    """What a client is doing."""

    IDLE = "idle"
    """Not in the cohort, or done with its part."""
    AVAILABLE = "available"
    """In the cohort and inside a window; work begins at once."""
    TRAINING = "training"
    """Receiving the model and training."""
    UPLOADING = "uploading"
    """Sending its update."""


@dataclass(frozen=True)
class Event:
    """Something that happens to a client at a virtual time."""

    time_s: float
    kind: EventKind
    cid: int


class EventQueue:
    """A heap of events; ties are decided by kind, then by the order in which they were pushed.

    Cost: O(log n) an event, n the number of pending events (of dispatched clients only).

    Args:
        now_s: Virtual time.
        pending: Events with their tie-breaking numbers, as `snapshot` returns them.
    """

    def __init__(
        self, now_s: float = 0.0, pending: Iterator[tuple[int, Event]] | tuple[()] = ()
    ) -> None:
        self.now_s = now_s
        self._heap = [(e.time_s, int(e.kind), number, e) for number, e in pending]
        heapq.heapify(self._heap)
        self._pushed = max((number for _, _, number, _ in self._heap), default=-1) + 1

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, event: Event) -> None:
        """Add an event.

        Raises:
            ValueError: If it lies in the past.
        """
        if event.time_s < self.now_s:
            raise ValueError(f"{event} lies before the present, {self.now_s} s")
        heapq.heappush(self._heap, (event.time_s, int(event.kind), self._pushed, event))
        self._pushed += 1

    def pop(self) -> Event:
        """Remove the next event and set the clock to it."""
        self.now_s, _, _, event = heapq.heappop(self._heap)
        return event

    def snapshot(self) -> list[tuple[int, Event]]:
        """Return the pending events with their tie-breaking numbers."""
        return [(number, event) for _, _, number, event in sorted(self._heap, key=lambda h: h[:3])]
