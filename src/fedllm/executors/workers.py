"""Runs jobs on several processes, each with one resident base.

The processes are spawned, live for a whole run and talk through pipes. Jobs and updates are pickled
with their tensors as numpy arrays: both ends are this program, on this machine, and torch's own way
of sharing tensors would hold a file descriptor for each.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from fedllm.errors import FedLLMError, RunError
from fedllm.federation import Executor, Job, Progress, Update

logger = logging.getLogger(__name__)
_PATIENCE_S = 5.0
"""How long a worker may take to end when it is told to."""


class Recipe(Protocol):
    """Makes the executor of a worker process; it must be possible to pickle it."""

    def __call__(self, progress: Progress, worker: int) -> Executor:
        """Return the executor of a worker, by its number, that tells its progress."""


@dataclass
class WorkerExecutor:
    """Divides jobs among processes.

    Memory: one base model and one set of buffers a worker. Each gets neighbouring jobs of about
    equal work, so that clients still share passes; which worker is faster changes nothing.

    Args:
        recipe: Makes what runs the jobs of a worker.
        workers: How many processes; they start with the first jobs.
        threads: Of each; None divides the cores among them.
        progress: Told how far clients are.
    """

    recipe: Recipe
    workers: int
    threads: int | None = None
    progress: Progress | None = None
    _processes: list[Any] = field(default_factory=list, repr=False)
    _pipes: list[Connection] = field(default_factory=list, repr=False)

    def run(self, jobs: Sequence[Job]) -> list[Update]:
        """Return the update of each job, in the order of `jobs`.

        Raises:
            RunError: If a worker dies.
            FedLLMError: What a worker raised.
        """
        if not jobs:
            return []
        if not self._processes:
            self._start()
        shares = divided([job.steps * max(job.num_samples, 1) for job in jobs], self.workers)
        results: dict[int, list[Update]] = {}
        try:
            for worker, share in enumerate(shares):
                if share:
                    self._send(worker, list(jobs[share.start : share.stop]))
            waiting = {worker for worker, share in enumerate(shares) if share}
            while waiting:
                for worker, told in self._receive(waiting):
                    results[worker] = told
                    waiting.discard(worker)
        except BaseException:
            self.close(at_once=True)  # what the others are doing is of no use any more
            raise
        return [update for worker in sorted(results) for update in results[worker]]

    def close(self, *, at_once: bool = False) -> None:
        """End the processes; they start again with the next jobs."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for process in self._processes:
            if at_once:
                process.kill()
            process.join(_PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        threads = self.threads or max((os.cpu_count() or 1) // self.workers, 1)
        recipe = packed(self.recipe)
        for number in range(self.workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_work,
                args=(there, recipe, threads, number),
                name=f"worker {number}",
                daemon=True,
            )
            process.start()
            there.close()  # so that a worker's death is the end of its pipe
            self._processes.append(process)
            self._pipes.append(here)

    def _send(self, worker: int, jobs: list[Job]) -> None:
        try:
            self._pipes[worker].send_bytes(packed(jobs))
        except OSError:
            raise self._death(worker) from None

    def _receive(self, waiting: set[int]) -> list[tuple[int, list[Update]]]:
        """Return what workers have finished; progress is passed on."""
        numbers = {self._pipes[worker]: worker for worker in waiting}
        found = []
        for pipe in wait(list(numbers)):
            worker = numbers[pipe]  # type: ignore[index]
            try:
                kind, content = unpacked(self._pipes[worker].recv_bytes())
            except (EOFError, OSError):
                raise self._death(worker) from None
            if kind == "progress":
                if self.progress is not None:
                    self.progress(*content)
            elif kind == "error":
                raise _error(*content)
            else:
                found.append((worker, content))
        return found

    def _death(self, worker: int) -> RunError:
        process = self._processes[worker]
        process.join(_PATIENCE_S)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit {code}"
        why = ", as a lack of memory does" if code == -signal.SIGKILL else ""
        return RunError(
            f"{process.name} of {self.workers} died ({how}{why}). All up to the last checkpoint is"
            " safe: continue with fedllm run --resume DIR, with fewer execution.workers if memory"
            " was short"
        )


def divided(work: Sequence[float], count: int) -> list[range]:
    """Divide neighbouring items among so many, as evenly as whole items allow.

    >>> divided([1, 1, 1, 3], 2)
    [range(0, 3), range(3, 4)]
    """
    total, done, start = sum(work) or 1.0, 0.0, 0
    shares = []
    for number in range(1, count + 1):
        stop = start
        while stop < len(work) and (
            number == count or done + work[stop] / 2 <= total * number / count
        ):
            done += work[stop]
            stop += 1
        shares.append(range(start, stop))
        start = stop
    return shares


def _work(pipe: Connection, recipe: bytes, threads: int, number: int) -> None:
    """Serve one pipe until its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process is interrupted, and ends this
    torch.set_num_threads(threads)
    executor: Executor | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs = unpacked(pipe.recv_bytes())
            try:
                if executor is None:
                    make: Recipe = unpacked(recipe)
                    executor = make(partial(_tell, pipe), number)
                answer = ("done", executor.run(jobs))
            except Exception as error:
                answer = ("error", (error if _is_plain(error) else None, traceback.format_exc()))  # type: ignore[assignment]
            pipe.send_bytes(packed(answer))


def _tell(pipe: Connection, cid: int, done: int, total: int) -> None:
    pipe.send_bytes(packed(("progress", (cid, done, total))))


def _is_plain(error: Exception) -> bool:
    """Tell whether an error is one of ours and survives the way to the main process."""
    try:
        return isinstance(error, FedLLMError) and isinstance(unpacked(packed(error)), type(error))
    except Exception:  # whatever its constructor wants, the text is told instead
        return False


def _error(error: FedLLMError | None, text: str) -> Exception:
    if error is not None:
        return error
    logger.error("a worker failed:\n%s", text)
    last = text.strip().splitlines()[-1]
    return RunError(f"a worker failed: {last}. The log of the run has all of it")


class _Pickler(pickle.Pickler):
    """Puts tensors down as arrays: a copy each, and no descriptor."""

    def reducer_override(self, item: Any) -> Any:
        """Say how a tensor is made again."""
        if isinstance(item, torch.Tensor) and not item.is_meta:
            own = item.detach().cpu().contiguous()
            raw = own.reshape(-1).view(torch.uint8).numpy().tobytes()
            return _tensor, (raw, str(own.dtype), tuple(own.shape))
        return NotImplemented


def _tensor(raw: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind = getattr(torch, dtype.removeprefix("torch."))
    if not raw:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(raw), dtype=kind).view(shape)


def packed(item: Any) -> bytes:
    """Return an object as bytes.

    Raises:
        RunError: If it cannot be pickled.
    """
    out = io.BytesIO()
    try:
        _Pickler(out, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise RunError(
            f"with execution.workers everything a job needs must be picklable, and this is not:"
            f" {error}. Set execution.workers: 0, or define it at the top of a module"
        ) from error
    return out.getvalue()


def unpacked(data: bytes) -> Any:
    """Return what `packed` was given, from another process of this program."""
    return pickle.loads(data)
