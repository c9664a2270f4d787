"""Aggregation that a few faulty or malicious clients cannot take over.

Each rule turns the parts of an aggregation into other parts, before the algorithm sees them. All of
them look at shared tensors one by one, so they belong with algorithms that average factors; the
median of factors is not the median of products. Rules that move or choose look at a client's
*change*: the distance to its download. No rule depends on the order of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Protocol, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from fedllm.adapters import Adapter
from fedllm.adapters.lazy import LazyModule
from fedllm.errors import ConfigError, TrainingError, did_you_mean, unknown
from fedllm.federation.messages import Job, Part, Update
from fedllm.federation.validation import change, downloads, norm, origin
from fedllm.registry import Entry, Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


class Robust(Protocol):
    """What turns the parts of an aggregation into other parts."""

    def __call__(self, parts: Sequence[Part], jobs: Sequence[Job]) -> list[Part]:
        """Return new parts; `jobs` holds at least those that the parts come from."""


@dataclass(frozen=True)
class Mean:
    """Changes nothing: the algorithm takes its weighted mean."""

    def __call__(self, parts: Sequence[Part], jobs: Sequence[Job]) -> list[Part]:
        """Return the parts as they are."""
        return list(parts)


@dataclass(frozen=True)
class Median:
    """Takes the median of each coordinate, unweighted (Yin et al., ICML 2018).

    Less than half of the clients cannot move a coordinate out of the range of the others.
    """

    def __call__(self, parts: Sequence[Part], jobs: Sequence[Job]) -> list[Part]:
        """Return one part, with the medians over the clients that sent each tensor.

        Raises:
            ValueError: If clients sent unequal shapes, or scalings: there is no such median.
        """
        return _combined(parts, _median)


@dataclass(frozen=True)
class TrimmedMean:
    """Takes the mean of each coordinate without its extremes, unweighted (Yin et al.)."""

    share: Annotated[float, Field(ge=0.0, lt=0.5)]
    """Share of the clients left out at either end, rounded down to whole clients."""

    def __call__(self, parts: Sequence[Part], jobs: Sequence[Job]) -> list[Part]:
        """Return one part, with the trimmed means over the clients that sent each tensor.

        Raises:
            ValueError: If clients sent unequal shapes, or scalings: there is no such mean.
        """
        return _combined(parts, lambda values: _trimmed(values, self.share))


@dataclass(frozen=True)
class Krum:
    """Keeps the changes that lie closest to most others (Blanchard et al., NeurIPS 2017).

    A client's score is the sum of the squared distances to its K - f - 2 nearest neighbours of K
    clients; the smallest scores are kept. Clients that tie are taken by number.
    """

    byzantine: Annotated[int, Field(ge=0)]
    """f: how many clients of an aggregation may be faulty."""
    keep: Annotated[int, Field(ge=1)] = 1
    """How many clients are kept, with their weights (1: Krum; more: multi-Krum)."""

    @property
    def fewest(self) -> int:
        """The smallest number of clients that will do: 2 f + 3, and f + 2 besides those kept."""
        return self.byzantine + 2 + max(self.keep, self.byzantine + 1)

    def __call__(self, parts: Sequence[Part], jobs: Sequence[Job]) -> list[Part]:
        """Return the parts kept; together they weigh what all did.

        Raises:
            TrainingError: If there are fewer parts than `fewest`.
            ValueError: If clients sent different tensors, or unequal shapes.
        """
        ordered = _ordered(parts)
        if len(ordered) < self.fewest:
            raise TrainingError(
                f"Krum with byzantine {self.byzantine} and keep {self.keep} needs at least"
                f" {self.fewest} updates and got {len(ordered)}; sample a larger cohort, or lower"
                " byzantine or keep"
            )
        near = len(ordered) - self.byzantine - 2
        scores = _distances(ordered, jobs).sort(dim=1).values[:, :near].sum(dim=1).tolist()
        best = sorted(range(len(ordered)), key=lambda i: (scores[i], i))[: self.keep]
        kept = [ordered[i] for i in sorted(best)]
        scale = _weight(ordered) / _weight(kept)
        return [Part(part.weight * scale, part.update) for part in kept]


@dataclass(frozen=True)
class NormBound:
    """Scales a client's change, all tensors as one vector, to a largest norm (Sun et al., 2019)."""

    bound: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    """Largest Frobenius norm of a change."""

    def __call__(self, parts: Sequence[Part], jobs: Sequence[Job]) -> list[Part]:
        """Return all parts, by client; a change that is not finite becomes none."""
        ordered = _ordered(parts)
        starts = downloads(ordered, jobs)
        return [
            Part(part.weight, self._bounded(part.update, start))
            for part, start in zip(ordered, starts, strict=True)
        ]

    def _bounded(self, update: Update, download: Adapter) -> Update:
        changes = change(update.adapter, download)
        size = norm(changes)
        if size <= self.bound:
            return update
        tensors = {}
        for name, by in changes.items():
            tensor = update.adapter[name]
            start = origin(name, tensor, download)
            end = start + by * (self.bound / size) if math.isfinite(size) else start
            tensors[name] = end.to(tensor.dtype)
        return replace(update, adapter=update.adapter.overlaid(tensors))


ROBUST = Table(
    "robust aggregation",
    {
        "mean": Entry(f"{__name__}:Mean", "the algorithm's weighted mean"),
        "median": Entry(f"{__name__}:Median", "median of each coordinate, unweighted"),
        "trimmed-mean": Entry(
            f"{__name__}:TrimmedMean", "mean of each coordinate without a share at either end"
        ),
        "krum": Entry(f"{__name__}:Krum", "the one client that lies closest to most others"),
        "multi-krum": Entry(f"{__name__}:Krum", "the clients that lie closest to most others"),
        "norm-bound": Entry(f"{__name__}:NormBound", "each client's change scaled to a norm"),
    },
)
"""How aggregation can be made robust; each entry is a `Robust` class."""

_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "mean": (),
    "median": (),
    "trimmed-mean": ("share",),
    "krum": ("byzantine",),
    "multi-krum": ("byzantine", "keep"),
    "norm-bound": ("bound",),
}
"""What each rule must be given."""


def make(name: str, settings: Mapping[str, Any]) -> Robust:
    """Return the rule of this name.

    >>> make("trimmed-mean", {"share": 0.2})
    TrimmedMean(share=0.2)

    Raises:
        ConfigError: If the name or a setting is wrong, or one is missing.
    """
    wrong = problems(name, settings)
    if wrong:
        raise ConfigError(wrong)
    made: Robust = ROBUST.load(name)(**settings)
    return made


def problems(name: str, settings: Mapping[str, Any], where: str = "robust") -> list[str]:
    """Return what is wrong with a rule's name and settings, found in section `where`."""
    if name not in ROBUST:
        return [f"{where}.name: {unknown(ROBUST.kind, name, ROBUST)}"]
    known = _SETTINGS[name]
    types = get_type_hints(ROBUST.load(name), include_extras=True)
    wrong = []
    for key, value in settings.items():
        if key not in known:
            hint = f" '{name}' has: {', '.join(known)}" if known else f" '{name}' has none"
            wrong.append(f"{where}.{key}: unknown key.{did_you_mean(key, known) or hint}")
            continue
        try:
            TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            wrong.append(f"{where}.{key}: {error.errors()[0]['msg'].lower()} (got {value!r})")
    missing = [key for key in known if key not in settings]
    return wrong + [f"{where}.{key}: '{name}' needs a value for it" for key in missing]


def _ordered(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: (part.update.cid, part.update.version))


def _weight(parts: Sequence[Part]) -> float:
    return math.fsum(part.weight for part in parts)


def _combined(parts: Sequence[Part], reduce: Callable[[Tensor], Tensor]) -> list[Part]:
    """Return one part whose tensors are `reduce` of the stacked ones, float64 (clients, ...)."""
    if not parts:
        return []
    ordered = _ordered(parts)
    adapters = [part.update.adapter for part in ordered]
    tensors = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        sent = [adapter[name] for adapter in adapters if name in adapter]
        tensors[name] = reduce(_stacked(name, sent)).to(sent[0].dtype)
    first = ordered[0].update
    update = replace(
        first,
        adapter=replace(first.adapter, tensors=tensors, scaling=_scaling(adapters)),
        num_samples=sum(part.update.num_samples for part in ordered),
        # private tensors and losses are one client's, this update is not
        state={},
        metrics={},
    )
    return [Part(_weight(ordered), update)]


def _stacked(name: str, sent: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(tensor.shape) for tensor in sent})
    if len(shapes) > 1:
        raise ValueError(
            f"clients sent '{name}' in shapes {', '.join(map(str, shapes))}: robust aggregation"
            " is undefined for unequal ranks; give all clients one rank"
        )
    if not sent[0].is_floating_point():
        raise ValueError(f"'{name}' holds whole numbers: robust aggregation is undefined for them")
    return torch.stack([tensor.to(torch.float64) for tensor in sent])


def _scaling(adapters: Sequence[Adapter]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for adapter in adapters:
        for path, scaling in adapter.scaling.items():
            if merged.setdefault(path, scaling) != scaling:
                raise ValueError(
                    f"clients scale '{path}' by {merged[path]} and {scaling}: robust aggregation"
                    " is undefined for unequal scalings"
                )
    return merged


def _median(values: Tensor) -> Tensor:
    ordered, half = values.sort(dim=0).values, len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _trimmed(values: Tensor, share: float) -> Tensor:
    # 0.29 * 100 is a little below 29
    cut = math.floor(share * len(values) + 1e-9)
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def _distances(parts: Sequence[Part], jobs: Sequence[Job]) -> Tensor:
    """Return the squared distances of all pairs of changes, (K, K), infinite to itself."""
    adapters, starts = [part.update.adapter for part in parts], downloads(parts, jobs)
    names = sorted(adapters[0])
    if any(sorted(adapter) != names for adapter in adapters):
        raise ValueError("clients sent different tensors: the distance of two is undefined")
    squared = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for name in names:
        ends = _stacked(name, [adapter[name] for adapter in adapters])
        begins = [
            origin(name, own[name], start) for own, start in zip(adapters, starts, strict=True)
        ]
        rows = (ends - torch.stack(begins)).flatten(start_dim=1)
        # by matrix products, small distances would drown in large values
        exact = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        squared += exact.square().to(squared)
    # who sends what is no number is far from everybody
    return torch.nan_to_num(squared, nan=math.inf, posinf=math.inf).fill_diagonal_(math.inf)
