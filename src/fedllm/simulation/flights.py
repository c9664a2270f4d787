"""A dispatched client, from its download to the arrival of its update or its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedllm.federation import Job
from fedllm.simulation.events import ClientState
from fedllm.simulation.record import Row
from fedllm.system import World

_UPLOADING = ClientState.UPLOADING


@dataclass(slots=True)
class Awaited:
    """A chosen client that the server waits for."""

    number: int
    """Of the dispatch."""
    group: int
    close_s: float
    """End of the window that it will come in."""


@dataclass(slots=True)
class Flight:
    """A client at work: what it does, how long that takes, and what may come between.

    Everything but the time of the upload is decided when it begins: what a transfer shares its cell
    with is known only when the transfer begins.
    """

    job: Job
    number: int
    """Of the dispatch: no two jobs of a run have the same."""
    group: int
    """Of the schedule's groups, that which it was sent for."""
    began_s: float
    """Virtual time of its dispatch."""
    since_s: float
    """Virtual time since which it works without interruption."""
    close_s: float
    """Virtual end of its window."""
    download_s: float
    train_s: float
    left_s: float
    """Seconds of its phase that were left at `since_s`."""
    down_bytes: int
    up_bytes: int
    """As expected, until its update has arrived: an algorithm may send less."""
    known_before: int | None
    """Version that the client had downloaded before."""
    upload_s: float
    """As expected, if it shares its cell with nobody and is not paused, until the upload begins."""
    leaves_after_s: float
    """Seconds of work after which the client is gone."""
    expected_s: float
    """Virtual time of its arrival, if it shares its cell with nobody and is not paused."""
    cell: int | None = None
    """Whose capacity its transfers share; None if it shares with nobody."""
    done_s: float = 0.0
    """Seconds of work before `since_s`."""
    phase: ClientState = ClientState.TRAINING
    is_paused: bool = False
    is_doomed: bool = False
    """Whether it is certain not to arrive in time."""

    @property
    def cid(self) -> int:
        """The client."""
        return self.job.cid

    @property
    def state(self) -> ClientState:
        """What the client is doing."""
        return ClientState.IDLE if self.is_paused else self.phase

    def worked_s(self, now_s: float) -> float:
        """Return the seconds of work so far."""
        return self.done_s if self.is_paused else self.done_s + (now_s - self.since_s)

    def pause(self, now_s: float) -> None:
        """Stop in the middle of a phase."""
        self.done_s = self.worked_s(now_s)
        self.left_s -= now_s - self.since_s
        self.is_paused = True

    def resume(self, now_s: float, close_s: float) -> None:
        """Go on where it stopped."""
        self.since_s, self.close_s, self.is_paused = now_s, close_s, False

    def begin_upload(self, now_s: float) -> None:
        """Go on from training to sending."""
        self.phase, self.since_s = _UPLOADING, now_s
        self.done_s = self.download_s + self.train_s
        self.left_s = self.upload_s

    def row(
        self, now_s: float, world: World, version: int, outcome: str, staleness: int | None = None
    ) -> Row:
        """Return its line of the ledger (`record.LEDGER`): what it did, took and moved.

        Args:
            now_s: Virtual time.
            world: Says what energy it took.
            version: Of the server.
            outcome: How it ended.
            staleness: How many versions late its update has arrived; None: it has not.
        """
        download_s, train_s, upload_s = self.download_s, self.train_s, self.upload_s
        down_bytes, up_bytes, job = self.down_bytes, self.up_bytes, self.job
        if staleness is None:
            worked = self.worked_s(now_s)
            download_s = min(worked, download_s)
            train_s = min(worked - download_s, train_s)
            upload_s = max(worked - download_s - train_s, 0.0)
            received = download_s / self.download_s if self.download_s else 1.0
            sent = upload_s / self.upload_s if self.upload_s else 0.0
            down_bytes, up_bytes = int(down_bytes * received), int(up_bytes * sent)
        return (
            job.cid,
            self.number,
            job.payload.version,
            self.began_s,
            now_s,
            download_s,
            train_s,
            upload_s,
            job.steps,
            staleness,
            down_bytes,
            up_bytes,
            world.energy_j(job.cid, train_s, download_s, upload_s),
            version + 1,
            outcome,
        )


def fitting_job(job: Job, is_in_time: Callable[[int], bool]) -> Job:
    """Return the job with as many steps as its client can do and send in time.

    Args:
        job: All steps.
        is_in_time: Tells whether so many steps can be done and sent; more steps take longer.

    Returns:
        The job as it is, where all steps fit, or not even one does.
    """
    if is_in_time(job.steps):
        return job
    low, high = 0, job.steps  # `low` steps fit (or none does), `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_in_time(middle) else (low, middle)
    return replace(job, steps=low, planned_steps=job.steps) if low else job
