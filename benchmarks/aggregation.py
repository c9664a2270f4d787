"""Server arithmetic from factors against dense matrices; `python -m benchmarks.aggregation`.

One module of d x d, K clients of rank r. The dense sides form the weighted sum of products as a
matrix and factor that, as published code does. A dense SVD takes half a minute, so it runs once
unless told otherwise, and without a warm-up; ours runs several times before and after it, and
medians count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import show, write
from fedllm.adapters import Adapter, algebra, name_a, name_b
from fedllm.adapters.factoring import balanced_split, qr_split, residual

PATH = "layer"
SCALING = {PATH: 2.0}
GOALS = {"vs_dense_svd": "20x"}
Parts = list[tuple[float, Adapter]]
Work = Callable[[], object]


def cohort(width: int, clients: int, rank: int) -> Parts:
    """Draw adapters of one square module, in fp32."""
    draw = torch.Generator().manual_seed(0)
    parts = []
    for k in range(clients):
        a = torch.randn(rank, width, generator=draw) / width**0.5
        b = torch.randn(width, rank, generator=draw)
        parts.append((float(k + 1), Adapter({name_a(PATH): a, name_b(PATH): b}, SCALING)))
    return algebra.normalised(parts)


def summed(parts: Parts) -> Tensor:
    """Return the weighted sum of products as a matrix."""
    total = torch.zeros(parts[0][1][name_b(PATH)].shape[0], parts[0][1][name_a(PATH)].shape[1])
    for weight, one in parts:
        total += weight * one.scaling[PATH] * (one[name_b(PATH)] @ one[name_a(PATH)])
    return total


def dense_svd(parts: Parts, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of FlexLoRA by the SVD of the matrix."""
    u, s, vh = torch.linalg.svd(summed(parts), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def dense_qr(parts: Parts, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of ILoRA by the QR of the matrix."""
    q, r = torch.linalg.qr(summed(parts))
    return q[:, :rank], r[:rank]


def dense_residual(parts: Parts, mean: Adapter) -> Tensor:
    """Return the residual of FedEx-LoRA as a matrix."""
    return summed(parts) - mean.product(PATH).dense()


def seconds(work: Work) -> float:
    """Return how long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def against(ours: dict[str, Work], dense: Work, runs: int, dense_runs: int) -> dict[str, Any]:
    """Return how many times as fast as `dense` each of ours is, runs interleaved."""
    for work in ours.values():
        work()
    took: dict[str, list[float]] = {name: [] for name in ours}
    slow: list[float] = []
    for _ in range(dense_runs):
        for name, work in ours.items():
            took[name] += [seconds(work) for _ in range(runs)]
        slow.append(seconds(dense))
    for name, work in ours.items():
        took[name] += [seconds(work) for _ in range(runs)]
    return {name: _row(times, slow) for name, times in took.items()}


def _row(ours: list[float], dense: list[float]) -> dict[str, Any]:
    typical = statistics.median(dense)
    return {
        "ratio": round(typical / statistics.median(ours), 1),
        "ours": round(statistics.median(ours), 4),
        "other": round(typical, 3),
        "unit": "s",
        "runs": len(ours),
        "dense_runs": len(dense),
        "lowest": round(min(dense) / max(ours), 1),
        "highest": round(max(dense) / min(ours), 1),
    }


def main() -> None:
    """Measure, print and write `aggregation.json`: seconds, and how many times as fast."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dense-svd-runs", type=int, default=1)
    options = parser.parse_args()
    parts, rank = cohort(options.width, options.clients, options.rank), options.rank
    mean = Adapter(algebra.mean(parts, parts[0][1]), SCALING)
    sums = partial(algebra.mean_products, parts)
    by_svd: dict[str, Work] = {
        "vs_dense_svd": lambda: algebra.refactor(sums(), rank, SCALING),
        "balanced_split": lambda: balanced_split(sums(), rank, SCALING, 1.0),
    }
    by_qr: dict[str, Work] = {"qr_split": lambda: qr_split(sums(), rank, SCALING)}
    by_difference: dict[str, Work] = {"residual": lambda: residual(parts, mean)}
    runs = options.runs
    found = {
        **against(by_difference, partial(dense_residual, parts, mean), runs, runs),
        **against(by_qr, partial(dense_qr, parts, rank), runs, 2),
        **against(by_svd, partial(dense_svd, parts, rank), runs, options.dense_svd_runs),
    }
    title = f"{options.width} x {options.width}, {options.clients} clients, rank {rank}, seconds"
    show(title, found, GOALS)
    shape = {"width": options.width, "clients": options.clients, "rank": rank, "dtype": "float32"}
    print(write("aggregation", {**found, "shape": shape}))


if __name__ == "__main__":
    main()
