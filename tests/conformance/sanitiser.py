"""Hashes every tensor that a running job must not write to, and tells which one it wrote."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from conformance.world import Federation
from fedllm.federation import Job, Update


def tensors_in(value: object, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that can be reached from a value, with the way to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key}]")
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name), f"{path}.{f.name}")
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors_in(vars(value), path)


def digest(tensor: Tensor) -> str:
    """Return a hash of shape and content."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + flat.numpy().tobytes()).hexdigest()


def fingerprint(federation: Federation, jobs: Sequence[Job]) -> dict[str, str]:
    """Hash what `run` must leave alone: server, client behaviour, all private states, all jobs."""
    watched = {
        "server": federation.server,
        "client": federation.client,
        "store": federation.store,
        "jobs": list(jobs),
    }
    return {path: digest(t) for path, t in tensors_in(watched, "")}


def leaks(
    federation: Federation, jobs: Sequence[Job], run: Callable[[], Sequence[Update]]
) -> list[str]:
    """Return the paths of tensors that appeared, vanished or changed while `run` ran."""
    before = fingerprint(federation, jobs)
    run()
    after = fingerprint(federation, jobs)
    return sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
