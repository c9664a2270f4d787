"""What an update must be before it is aggregated, and how far it has moved from its download."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedllm.adapters import Adapter, is_a, is_b, is_core, module_of
from fedllm.adapters.lazy import LazyModule
from fedllm.federation.messages import Job, Part, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

MOST_FITS = 4
"""How often an algorithm may train within one job (a global and a local adapter, say)."""


def downloads(parts: Sequence[Part], jobs: Sequence[Job]) -> list[Adapter]:
    """Return what the client of each part started from.

    Raises:
        ValueError: If the job of a part is not given.
    """
    known = {(job.cid, job.version): job.payload.adapter for job in jobs}
    asked = [(part.update.cid, part.update.version) for part in parts]
    for cid, version in asked:
        if (cid, version) not in known:
            raise ValueError(f"the job of client {cid} from version {version} is not given")
    return [known[key] for key in asked]


def origin(name: str, tensor: Tensor, download: Adapter) -> Tensor:
    """Return where a client's tensor started, in float64.

    That is what the client downloaded, and zeros if it downloaded nothing of this name and shape.
    """
    if name in download and download[name].shape == tensor.shape:
        return download[name].to(tensor.device, torch.float64)
    return torch.zeros_like(tensor, dtype=torch.float64)


def change(adapter: Adapter, download: Adapter) -> dict[str, Tensor]:
    """Return how far every tensor of an adapter is from its origin, in float64.

    Tensors of whole numbers (the places of a sparse change) have no such distance.
    """
    return {
        name: moved(name, tensor, download)
        for name, tensor in adapter.tensors.items()
        if tensor.is_floating_point()
    }


def moved(name: str, tensor: Tensor, download: Adapter) -> Tensor:
    """Return how far one tensor is from its origin, in float64."""
    return tensor.to(torch.float64) - origin(name, tensor, download)


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Frobenius norm of all tensors together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def reject_reason(
    update: Update,
    job: Job,
    expected: Mapping[str, Tensor],
    max_norm: float | None = None,
) -> str | None:
    """Return why an update must not be aggregated, in one sentence, or None if it may.

    The values of meta tensors are not looked at; neither are those of integer tensors.

    Args:
        update: What a client sent.
        job: What the client was asked to do.
        expected: The tensors it should send: names, dtypes and shapes count, values do not. A
            client may send a smaller rank, the same one for all tensors of a path.
        max_norm: Largest Frobenius norm of the whole change against the download (against zero
            for tensors that were not downloaded in this shape); None for any.
    """
    return (
        _wrong_answer(update, job)
        or _wrong_counts(update, job)
        or _wrong_names(update, expected)
        or _wrong_forms(update, expected)
        or _wrong_ranks(update)
        or _wrong_scaling(update, job)
        or _wrong_values(update, job.payload.adapter, max_norm)
    )


def _wrong_answer(update: Update, job: Job) -> str | None:
    if update.cid != job.cid:
        return f"client {update.cid} answered the job of client {job.cid}"
    if update.version != job.version:
        return (
            f"client {update.cid} started from version {update.version}, its job from version"
            f" {job.version}"
        )
    return None


def _wrong_counts(update: Update, job: Job) -> str | None:
    rows, steps, loss = update.num_samples, update.num_steps, update.metrics.get("loss", 0.0)
    if rows < 1:
        return f"client {update.cid} claims {rows} training rows, at least 1 expected"
    if rows != job.num_samples:
        return f"client {update.cid} claims {rows} training rows, {job.num_samples} expected"
    if not 0 <= steps <= MOST_FITS * job.steps:
        return (
            f"client {update.cid} claims {steps} steps, between 0 and {MOST_FITS} times the"
            f" {job.steps} of its job expected"
        )
    # who did no step has no loss
    if steps and not math.isfinite(loss):
        return f"client {update.cid} reports a loss of {loss}, a finite one expected"
    return None


def _wrong_names(update: Update, expected: Mapping[str, Tensor]) -> str | None:
    strange = [name for name in update.adapter if name not in expected]
    missing = [name for name in expected if name not in update.adapter]
    faults = []
    if strange:
        faults.append(f"sent unexpected tensors ({_listed(strange)})")
    if missing:
        faults.append(f"did not send expected tensors ({_listed(missing)})")
    return f"client {update.cid} {' and '.join(faults)}" if faults else None


def _listed(names: list[str]) -> str:
    """Name the first few, so that a sentence stays one."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


def _wrong_forms(update: Update, expected: Mapping[str, Tensor]) -> str | None:
    """Check each tensor by itself: dtype, and shape but for the rank."""
    for name, tensor in update.adapter.tensors.items():
        wanted = expected[name]
        if tensor.dtype != wanted.dtype:
            found, right = (str(t.dtype).removeprefix("torch.") for t in (tensor, wanted))
            return f"client {update.cid} sent '{name}' as {found}, {right} expected"
        if not _fits(name, tuple(tensor.shape), tuple(wanted.shape)):
            return (
                f"client {update.cid} sent '{name}' of shape {tuple(tensor.shape)},"
                f" {tuple(wanted.shape)} expected"
            )
    return None


def _rank_axes(name: str) -> tuple[int, ...]:
    if is_a(name):
        return (0,)
    if is_b(name):
        return (1,)
    return (0, 1) if is_core(name) else ()


def _fits(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether a shape is the wanted one, or that of a smaller rank."""
    axes = _rank_axes(name)
    return len(shape) == len(wanted) and all(
        1 <= size <= most if axis in axes else size == most
        for axis, (size, most) in enumerate(zip(shape, wanted, strict=True))
    )


def _wrong_ranks(update: Update) -> str | None:
    """Check the tensors of a path together: they have one rank."""
    first: dict[str, tuple[str, int]] = {}
    for name, tensor in update.adapter.tensors.items():
        for axis in _rank_axes(name):
            rank = tensor.shape[axis]
            other, known = first.setdefault(module_of(name), (name, rank))
            if rank != known:
                return (
                    f"client {update.cid} sent '{name}' of rank {rank} and '{other}' of rank"
                    f" {known}, one rank a path expected"
                )
    return None


def _wrong_scaling(update: Update, job: Job) -> str | None:
    """Check what would change every product without showing in any tensor."""
    downloaded = job.payload.adapter.scaling
    for path in update.adapter.modules:
        found = update.adapter.scaling.get(path, math.nan)
        wanted = downloaded.get(path, found)
        if not (math.isfinite(found) and found == wanted):
            return (
                f"client {update.cid} sent path '{path}' with scaling {found},"
                f" {wanted if path in downloaded else 'a finite one'} expected"
            )
    if update.adapter.routing not in (None, job.payload.adapter.routing):
        return f"client {update.cid} sent another routing than it downloaded"
    return None


def _wrong_values(update: Update, download: Adapter, max_norm: float | None) -> str | None:
    squares: dict[str, float] = {}
    for name, tensor in update.adapter.tensors.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            return _not_finite(update.cid, name, tensor)
        if max_norm is not None and not (name in download and download[name].is_meta):
            squares[name] = float(moved(name, tensor, download).square().sum())
    total = math.sqrt(sum(squares.values()))
    if max_norm is None or total <= max_norm:
        return None
    most = max(squares, key=squares.__getitem__)
    return (
        f"client {update.cid} sent a change of norm {total:.4g}, at most {max_norm:.4g} expected;"
        f" '{most}' alone has {math.sqrt(squares[most]):.4g}"
    )


def _not_finite(cid: int, name: str, tensor: Tensor) -> str:
    places = (~torch.isfinite(tensor)).nonzero()
    place = tuple(int(i) for i in places[0])
    return (
        f"client {cid} sent '{name}' with {len(places)} of {tensor.numel()} values not finite,"
        f" the first {float(tensor[place])} at {place}"
    )
