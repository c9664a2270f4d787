"""Several processes that train one model together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedllm.errors import FedLLMError

_POLL_S = 0.1


def world_size() -> int:
    """Return how many processes train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for the other processes."""
    if world_size() > 1:
        torch.distributed.barrier()


def shared(value: Any) -> Any:
    """Return what the first process has."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Return what each process has, in all of them."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(box, value)
    return box


def is_first() -> bool:
    """Tell whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: str) -> None:
    """Meet the other processes, where a launcher has started several.

    Args:
        device: `model.device`; a CPU process talks to others through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def agreed(act: Callable[[], Any]) -> Any:
    """Carry something out in the first process; all processes raise what it raises."""
    found, problem = None, None
    if is_first():
        try:
            found = act()
        except FedLLMError as error:
            problem = error
    problem = shared(problem)
    if problem is not None:
        raise problem
    return found


def launch(count: int, words: Sequence[str]) -> int:
    """Start processes that train together, and wait for them.

    Args:
        count: How many.
        words: The command line of each, after `python -m fedllm`.

    Returns:
        The exit code of the first that fails, else 0. The others are then ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}  # fmt: skip
    common.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "fedllm", *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(count)
    ]
    try:
        while True:
            codes = [process.poll() for process in running]
            failed = [code for code in codes if code]
            if failed or all(code == 0 for code in codes):
                return failed[0] if failed else 0
            time.sleep(_POLL_S)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
                process.wait()
