"""Events, client states, and the queue that is the virtual clock. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, IntEnum
from heapq import heapify, heappop, heappush
from typing import NamedTuple

NOBODY = -1
"""Client of an event that concerns no client."""


class EventKind(IntEnum):
    """What can happen. At one instant windows open first: who begins together, trains together.

    What is done at the instant at which its client leaves, its window closes or its round ends is
    done in time.
    """

    WINDOW_OPEN = 0
    """A client that the server waits for is there, or a paused one is back."""
    TRAINING_DONE = 1
    """A client has received the model and trained; it begins to send."""
    UPLOAD_DONE = 2
    """An update has arrived."""
    DROPOUT = 3
    """A client has left in the middle of its work."""
    WINDOW_CLOSE = 4
    """A window closes before its client is done."""
    DEADLINE = 5
    """The server waits no longer."""


WINDOW_OPEN, TRAINING_DONE, UPLOAD_DONE, DROPOUT, WINDOW_CLOSE, DEADLINE = EventKind
"""The kinds as plain names, for the loop: to read a member of an enum costs as much as a call."""


class ClientState(Enum):
    """What a client is doing."""

    IDLE = "idle"
    """Without a job, or outside its window."""
    AVAILABLE = "available"
    """Chosen and inside a window; work begins at once."""
    TRAINING = "training"
    """Receiving the model and training."""
    UPLOADING = "uploading"
    """Sending its update."""


class Event(NamedTuple):
    """Something that happens at a virtual time; its order is that of the fields.

    `number` is that of the push, so no two events are ever equal and ties are always decided.
    """

    time_s: float
    kind: EventKind
    number: int
    cid: int
    """Client, or `NOBODY`."""
    job: int
    """Number of the dispatch it belongs to, or of the group whose deadline it is."""


Entry = tuple[float, EventKind, int, int, int]
"""An event as the heap holds it: plain, because every job makes several."""


class EventQueue:
    """A heap of events; ties are decided by kind, then by the order in which they were pushed.

    Cost: O(log n) an event, n the number of pending events (of dispatched clients only).

    Args:
        now_s: Virtual time.
        pending: Events as `snapshot` returns them.
    """

    def __init__(self, now_s: float = 0.0, pending: Iterable[Event] = ()) -> None:
        self.now_s = now_s
        self.pending: list[Entry] = list(pending)
        """The heap: the next event first."""
        heapify(self.pending)
        self._pushed = max((number for _, _, number, _, _ in self.pending), default=-1) + 1

    def __len__(self) -> int:
        return len(self.pending)

    def push(self, time_s: float, kind: EventKind, cid: int, job: int = 0) -> None:
        """Add an event.

        Raises:
            ValueError: If it lies in the past.
        """
        if time_s < self.now_s:
            raise ValueError(
                f"{kind.name} of client {cid} at {time_s} s lies before the present, {self.now_s} s"
            )
        heappush(self.pending, (time_s, kind, self._pushed, cid, job))
        self._pushed += 1

    def pop(self) -> Entry:
        """Remove the next event and set the clock to it."""
        entry = heappop(self.pending)
        self.now_s = entry[0]
        return entry

    def snapshot(self) -> list[Event]:
        """Return the pending events in their order."""
        return [Event(*entry) for entry in sorted(self.pending)]
