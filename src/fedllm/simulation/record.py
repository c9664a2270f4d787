"""What is told of a run, aggregation by aggregation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from fedllm.federation import Update


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
    ledger: Sequence[Mapping[str, Any]]
    """One line for each job that has ended since the version before; see `Flight.row`."""
    events: Sequence[Mapping[str, Any]]
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
        return dict(sorted(Counter(row["outcome"] for row in self.ledger).items()))


@dataclass
class Diary:
    """What has happened since the last aggregation."""

    events: list[dict[str, Any]] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def note(
        self,
        time_s: float,
        name: str,
        version: int,
        cid: int | None = None,
        job: int | None = None,
        state: str | None = None,
    ) -> dict[str, Any]:
        """Write down what happened, and return the line for more to be added to it."""
        line: dict[str, Any] = {
            "time_s": time_s,
            "event": name,
            "client": cid,
            "job": job,
            "round": version + 1,
            "state": state,
        }
        self.events.append(line)
        return line

    def come(
        self, time_s: float, version: int, cid: int, job: int, state: str, close_s: float
    ) -> None:
        """Write down that a client comes, and until when it is there: null for ever."""
        self.events.append(
            {
                "time_s": time_s,
                "event": "WINDOW_OPEN",
                "client": cid,
                "job": job,
                "round": version + 1,
                "state": state,
                "until_s": close_s if close_s < math.inf else None,
            }
        )

    def closed(self, **made: Any) -> Round:
        """Return what has happened as a round, and begin anew."""
        by_client = itemgetter("client")
        self.ledger.sort(key=itemgetter("job"))  # by job within a client: sorting is stable
        done = Round(
            rejected=sorted(self.rejected, key=by_client),
            ledger=sorted(self.ledger, key=by_client),
            events=self.events,
            **made,
        )
        self.events, self.ledger, self.rejected = [], [], []
        return done

    def reject(self, cid: int, reason: str) -> None:
        """Write down why an update is not used."""
        self.rejected.append({"client": cid, "reason": reason})
