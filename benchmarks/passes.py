"""How many tokens should share a pass; run it with `python -m benchmarks.passes`."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.measure import interleaved, write
from benchmarks.training import engine, our_training
from benchmarks.workload import BATCH, CLIENTS, SIZES, STEPS, rows
from fedllm.engine import CohortEngine

LIMITS = (256, 512, 1024, 2048, 4096)


def at(side: CohortEngine, limit: int) -> float:
    """Train a round with this many tokens in a pass."""
    side.resident.tokens_per_pass = limit
    return our_training(side, CLIENTS)()


def main() -> None:
    """Measure, print and write `passes.json`: useful training tokens a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    found: dict[str, Any] = {}
    for name, size in SIZES.items():
        data = rows(CLIENTS * BATCH * STEPS, size.vocabulary)
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            side = engine(size, dtype, data, CLIENTS)
            rates = interleaved({str(n): partial(at, side, n) for n in LIMITS}, runs)
            found[f"{name} {label}"] = {n: round(statistics.median(r)) for n, r in rates.items()}
            print(name, label, found[f"{name} {label}"])
    print(write("passes", found))


if __name__ == "__main__":
    main()
