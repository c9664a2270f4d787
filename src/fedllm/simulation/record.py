"""What is told of a run, aggregation by aggregation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, overload

from fedllm.federation import Update

EVENT = ("time_s", "event", "client", "job", "round", "state")
"""Names of what is told of an event."""
LEDGER = (
    *("client", "job", "version", "began_s", "ended_s", "download_s", "train_s", "upload_s"),
    *("steps", "staleness", "down_bytes", "up_bytes", "energy_j", "round", "outcome"),
)
"""Names of what is told of a job at its end."""
Row = tuple[Any, ...]


class Lines(Sequence[dict[str, Any]]):
    """Rows under common names: kept as tuples, in a third of the room, and read as mappings.

    Args:
        names: Of the values of a row, in order.
        rows: Each may end with one more name and its value.
    """

    def __init__(self, names: Sequence[str], rows: Sequence[Row]) -> None:
        self.names, self.rows = names, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._line, self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return list(map(self._line, self.rows[index]))
        return self._line(self.rows[index])

    def column(self, name: str) -> list[Any]:
        """Return the value of every row under one of the common names."""
        return list(map(itemgetter(self.names.index(name)), self.rows))

    def _line(self, row: Row) -> dict[str, Any]:
        line = dict(zip(self.names, row, strict=False))
        if len(row) > len(self.names):
            line[row[-2]] = row[-1]
        return line


@dataclass(frozen=True)
class Round:
    """What one server update was made of."""

    number: int
    """The version it made, from 1."""
    time_s: float
    """Virtual time at which it was made."""
    updates: Sequence[Update]
    """Those that were aggregated, by client."""
    rejected: Sequence[Mapping[str, Any]]
    """Client and reason of each update that was not."""
    agg_error: float | None
    """Distance of the aggregate from the ideal mean update; see `federation.fidelity`."""
    ledger: Lines
    """One line for each job that has ended since the version before; see `Flight.row`."""
    events: Lines
    """What happened since then, in order."""
    wall_s: Mapping[str, float]
    """Real seconds of local training and of aggregation; not reproducible."""
    staleness: Sequence[int]
    """How many versions late each update was."""
    in_flight: int
    """Clients still at work."""
    is_last: bool
    """Whether the run ends with it."""
    ended: str
    """Why the run ends here, if it does so before its last round; else empty."""

    @property
    def outcomes(self) -> dict[str, int]:
        """How many jobs ended in which way."""
        return dict(sorted(Counter(self.ledger.column("outcome")).items()))


@dataclass
class Diary:
    """What has happened since the last aggregation."""

    events: list[Row] = field(default_factory=list)
    ledger: list[Row] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def note(
        self,
        time_s: float,
        name: str,
        version: int,
        cid: int | None = None,
        job: int | None = None,
        state: str | None = None,
    ) -> None:
        """Write down what happened."""
        self.events.append((time_s, name, cid, job, version + 1, state))

    def come(
        self, time_s: float, version: int, cid: int, job: int, state: str, close_s: float
    ) -> None:
        """Write down that a client comes, and until when it is there: null for ever."""
        until_s = close_s if close_s < math.inf else None
        own = time_s, "WINDOW_OPEN", cid, job, version + 1, state, "until_s", until_s
        self.events.append(own)

    def leave(
        self, time_s: float, name: str, version: int, cid: int, job: int, state: str, outcome: str
    ) -> None:
        """Write down that a client leaves without an update, and why."""
        self.events.append((time_s, name, cid, job, version + 1, state, "outcome", outcome))

    def closed(self, **made: Any) -> Round:
        """Return what has happened as a round, and begin anew."""
        done = Round(
            rejected=sorted(self.rejected, key=itemgetter("client")),
            ledger=Lines(LEDGER, sorted(self.ledger)),  # by client, then by job
            events=Lines(EVENT, self.events),
            **made,
        )
        self.events, self.ledger, self.rejected = [], [], []
        return done

    def reject(self, cid: int, reason: str) -> None:
        """Write down why an update is not used."""
        self.rejected.append({"client": cid, "reason": reason})
