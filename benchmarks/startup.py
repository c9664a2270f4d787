"""What a population costs before the first round; run it with `python -m benchmarks.startup`."""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from typing import Any

from benchmarks.measure import ratio, show, write
from fedllm.config import Config
from fedllm.data import load_rows, partition
from fedllm.experiment import make_config
from fedllm.experiment.parts import build
from fedllm.simulation import Population

GOALS = {"clients_1000_vs_10": "below 1.5", "bytes_per_idle_client": "below 1000"}
_FEW, _MANY = 1_000, 101_000


def config(clients: int) -> Config:
    """Return the built-in default with this many clients."""
    federation = {"num_clients": clients, "cohort_size": 5, "partition": {"min_rows": 0}}
    return make_config({"federation": federation, "model": {"dtype": "float32"}})


def start_up(clients: int) -> float:
    """Return the seconds from a configuration to a run that could begin."""
    gc.collect()  # what the run before leaves behind is not this one's to clear
    begin = time.perf_counter()
    build(config(clients))
    return time.perf_counter() - begin


def idle_bytes() -> float:
    """Return the memory that each further client of the population takes."""
    made = config(_FEW)
    rows = load_rows(made.data, made.seed)
    held = []
    for clients in (_FEW, _MANY):
        gc.collect()
        tracemalloc.start()
        shards = partition(made.federation.partition, rows, clients, made.seed)
        population = Population(shards.train_sizes.tolist())
        kept = (shards, population, population.pool())
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del kept
    return (held[1] - held[0]) / (_MANY - _FEW)


def main() -> None:
    """Measure, print and write `startup.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    times: dict[int, list[float]] = {10: [], 1000: []}
    start_up(10)
    for _ in range(runs):
        for clients, taken in times.items():
            taken.append(start_up(clients))
    found: dict[str, Any] = {
        "clients_1000_vs_10": ratio(times[1000], times[10]),
        "bytes_per_idle_client": {"bytes": round(idle_bytes(), 1), "runs": 1},
    }
    show("Start-up, builtin:tiny on builtin:skills (seconds; bytes)", found, GOALS)
    print(write("startup", found))


if __name__ == "__main__":
    main()
