"""Jobs computed together when needed against one by one at once; `python -m benchmarks.lazy`.

FedAsync with 8 clients in flight on the built-in model, in a world in which durations differ,
without evaluation. Both sides make the same events and, up to rounding, the same adapter.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.measure import ratio, show, write
from fedllm.experiment import make_config
from fedllm.experiment.parts import build

GOALS = {"vs_eager": "1.3x"}
VERSIONS, IN_FLIGHT = 48, 8


def side(compute: str, rows: int) -> float:
    """Make so many versions and return their number; what comes before is not measured."""
    config = make_config(
        {
            "mode": "realistic",
            "model": {"dtype": "float32"},
            "data": {"path": "builtin:skills", "max_train_rows": 1600},
            "federation": {
                "num_clients": 32,
                "cohort_size": IN_FLIGHT,
                "rounds": VERSIONS,
                "schedule": "async",
            },
            "training": {"batch_size": rows, "local_steps": 4, "learning_rate": 1e-3},
            "system": {"devices": {"of": ["jetson-nano", "jetson-tx2", "laptop"], "spread": 0.3}},
            "execution": {"compute": compute},
        }
    )
    parts = build(config)
    begin = time.perf_counter()
    made = sum(1 for _ in parts.loop.run(VERSIONS))
    return made / (time.perf_counter() - begin)


def main() -> None:
    """Measure, print and write `lazy.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    found = {}
    for rows in (2, 8):
        rates: dict[str, list[float]] = {"lazy": [], "eager": []}
        side("lazy", rows)
        for _ in range(runs):
            for compute, own in rates.items():
                own.append(side(compute, rows))
        name = "vs_eager" if rows == 2 else f"vs_eager_batch_{rows}"
        found[name] = ratio(rates["lazy"], rates["eager"])
    write("lazy", found)
    show("versions a second, lazy against eager", found, GOALS)


if __name__ == "__main__":
    main()
