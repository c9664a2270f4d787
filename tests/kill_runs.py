"""Carries out small runs in forked processes and kills them; prints what became of each.

Started by `test_resume.py` as a process of its own, because only a process with one thread may be
forked safely, and because a fork costs milliseconds where an import costs seconds. A process is
killed by SIGKILL just before one of its moments: before it touches a file of the run (an audit
hook counts those), before an event in virtual time, or when it tells its progress.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_runs import Silent, final_digests, records, small_config

from fedllm.config import Config
from fedllm.experiment.run import resume, run
from fedllm.results import plots
from fedllm.seeding import rng
from fedllm.simulation import EventQueue
from fedllm.simulation.events import Entry

POP = EventQueue.pop
FILE_ACTS = {"open", "os.rename", "os.truncate", "os.mkdir", "os.remove", "os.rmdir"}


class Moments:
    """Counts the moments of a run below a folder, and dies just before a chosen one."""

    def __init__(self, folder: Path, last: int) -> None:
        self.prefix, self.last, self.seen = str(folder), last, 0
        self.events: dict[str, list[int]] = {}
        """Kind of event to the moments just before one of it."""

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_ACTS and self.prefix in os.fsdecode(str(arguments[0])):
            self.pass_by()

    def pop(self, queue: EventQueue) -> Entry:
        self.pass_by()
        entry = POP(queue)
        self.events.setdefault(entry[1].name, []).append(self.seen)
        return entry

    def pass_by(self) -> None:
        self.seen += 1
        if self.seen == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


class Dying(Silent):
    """Counts what it is told as moments."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def step(self, cid: int, done: int, total: int) -> None:
        self.moments.pass_by()

    def record(self, record: Any) -> None:
        self.moments.pass_by()


def in_a_fork(work: Callable[[], None]) -> bool:
    """Return whether the work came to its end; anything but a kill on the way is an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed by itself; see the error above")
    return not os.WIFSIGNALED(status)


def attempt(config: Config, last: int) -> bool:
    """Start the run or go on with it, dying before moment `last`; return whether it ended."""

    def work() -> None:
        moments = Moments(config.run_dir, last)
        watch_over(moments)
        if (config.run_dir / "config.yaml").exists():
            resume(config.run_dir, Dying(moments))
        else:
            run(config, Dying(moments))

    return in_a_fork(work)


def watch_over(moments: Moments) -> None:
    sys.addaudithook(moments.note)
    EventQueue.pop = lambda queue: moments.pop(queue)


def moments_of(config: Config) -> Moments:
    """Return the moments of a whole run."""
    moments = Moments(config.run_dir, 0)
    watch_over(moments)
    run(config, Dying(moments))
    return moments


def tell(config: Config) -> dict[str, Any]:
    """Return what the seed decides of a finished run."""
    texts = {name: data.decode() for name, data in records(config.run_dir).items()}
    temporary = [str(p) for p in config.run_dir.rglob("*tmp*")]
    return {"records": texts, "digests": final_digests(config.run_dir), "temporary": temporary}


def main(folder: Path, model: Path, data: Path, algorithm: str, runs: int, more: list[str]) -> None:
    torch.set_num_threads(1)
    plots.plot_run = lambda directory: []

    def config(name: str) -> Config:
        words = (f"name={name}", f"algorithm={algorithm}", "federation.rounds=3", *more)
        return small_config(folder, model, data, *words)

    moments = moments_of(config("whole"))
    total = moments.seen
    print(json.dumps({"moments": total, "kills": 0, **tell(config("whole"))}))
    order = rng(0, "kills", algorithm).permutation(total) + 1
    of_each_kind = [own[len(own) // 2] for own in moments.events.values()] if more else []
    chosen = [*of_each_kind, *order[:runs].tolist()]
    for number, first in enumerate(chosen):
        killed, last = config(f"killed-{number}"), first
        stream, kills = rng(1, "kills", algorithm, number), 0
        while not attempt(killed, last):
            kills += 1
            # the third try is left alone, so that every run comes to an end
            last = int(stream.integers(1, total)) if kills < 2 else 0
        print(json.dumps({"moment": first, "kills": kills, **tell(killed)}))


if __name__ == "__main__":
    places, (name, count, *words) = [Path(word) for word in sys.argv[1:4]], sys.argv[4:]
    main(*places, name, int(count), words)
