"""Training and evaluation throughput against PEFT; run it with `python -m benchmarks.training`."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks import peft_sides
from benchmarks.measure import Side, interleaved, matmul_peak, ratio, show, write
from benchmarks.workload import (
    BATCH,
    CLIENTS,
    RANK,
    SIZES,
    STEPS,
    Size,
    loaded,
    model,
    partition,
    rows,
)
from fedllm.adapters import BaseDelta
from fedllm.config import TrainingConfig
from fedllm.engine import CohortEngine, Resident
from fedllm.federation import BaseClient, Job, Payload, Plan, View

GOALS = {
    "vs_reference": "4x",
    "vs_peft fp32": "1.4x",
    "vs_peft bf16": "1.6x",
    "bf16_vs_fp32": "1.5x with AMX",
    "evaluation default": "8x",
}


def engine(size: Size, dtype: torch.dtype, data: Any, clients: int) -> CohortEngine:
    """Return our engine over the workload."""
    resident = Resident(loaded(size, dtype), "auto")
    plan = Plan(TrainingConfig(batch_size=BATCH, local_steps=STEPS, learning_rate=1e-4), 1)
    return CohortEngine(resident, data, partition(clients, BATCH * STEPS), plan)


def our_training(side: CohortEngine, clients: int, *, together: bool = True) -> Side:
    """Return the work of training all clients for a round."""
    start = side.resident.initial_adapter(RANK, 2.0, 0)
    requests = [
        side.fit(Job(cid, Payload(0, start), steps=STEPS, learning_rate=1e-4), start, BaseClient())
        for cid in range(clients)
    ]

    def work() -> float:
        groups = [requests] if together else [[request] for request in requests]
        results = [result for group in groups for result in side.train(group)]
        return sum(result.metrics["tokens"] for result in results)

    return work


def our_evaluation(side: CohortEngine, count: int) -> Side:
    """Return the work of scoring the first rows."""
    view = View(side.resident.initial_adapter(RANK, 2.0, 0), BaseDelta(), np.arange(count))

    def work() -> float:
        side.score([view], side.tokens)
        return float(side.tokens.lengths[:count].sum())

    return work


def flops_per_token(size: Size) -> float:
    """Return what training a token costs: forward 2, backward to activations 2, per weight."""
    per_layer = 4 * size.hidden**2 + 3 * size.hidden * (size.hidden * 8 // 3)
    return 4.0 * (size.layers * per_layer)


def compare(size_name: str, runs: int, clients: int) -> dict[str, dict[str, Any]]:
    """Measure one model size in both precisions."""
    size = SIZES[size_name]
    data = rows(clients * BATCH * STEPS, size.vocabulary)
    sides: dict[str, Side] = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours = engine(size, dtype, data, clients)
        sides[f"ours {label}"] = our_training(ours, clients)
        other = peft_sides.adapted(model(size, dtype))
        sides[f"peft {label}"] = _bound(other, data, clients, False)
        sides[f"reference {label}"] = _bound(other, data, clients, True)
        count = 4 * clients
        sides[f"ours eval {label}"] = our_evaluation(ours, count)
        sides[f"reference eval {label}"] = _bound_eval(other, data, count)
    rates = interleaved(sides, runs)
    found: dict[str, dict[str, Any]] = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours_rate = rates[f"ours {label}"]
        found[f"vs_reference {label}"] = ratio(ours_rate, rates[f"reference {label}"])
        found[f"vs_peft {label}"] = ratio(ours_rate, rates[f"peft {label}"])
        found[f"evaluation {label}"] = ratio(
            rates[f"ours eval {label}"], rates[f"reference eval {label}"]
        )
        peak = matmul_peak(dtype)
        reached = sorted(ours_rate)[len(ours_rate) // 2] * flops_per_token(size)
        found[f"peak_share {label}"] = {
            "ratio": round(reached / peak, 3),
            "ours": round(reached / 1e12, 4),
            "other": round(peak / 1e12, 4),
            "runs": runs,
        }
    found["bf16_vs_fp32"] = ratio(rates["ours bf16"], rates["ours fp32"])
    # as a user gets them: `dtype: auto` where bf16 is fast, and the reference in fp32
    found["evaluation default"] = ratio(rates["ours eval bf16"], rates["reference eval fp32"])
    return found


def _bound(other: Any, data: Any, clients: int, wide: bool) -> Side:
    return lambda: peft_sides.train(other, data, clients, padded_to_512=wide)


def _bound_eval(other: Any, data: Any, count: int) -> Side:
    return lambda: peft_sides.evaluate(other, data, count)


def main() -> None:
    """Measure, print and write `training.json` and `evaluation.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--clients", type=int, default=CLIENTS)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for size in options.sizes:
        rows = compare(size, options.runs, options.clients)
        show(f"{size}: {options.clients} clients, batch {BATCH}, rank {RANK}", rows, GOALS)
        found |= {f"{name} {size}": row for name, row in rows.items()}
    training = {
        "vs_reference": lowest(found, "vs_reference"),
        "vs_peft": lowest(found, "vs_peft fp32"),
        "vs_peft_bf16": lowest(found, "vs_peft bf16"),
        "bf16_vs_fp32": lowest(found, "bf16_vs_fp32"),
        "peak_share": lowest(found, "peak_share"),
    }
    evaluation = {
        "vs_reference": lowest(found, "evaluation default"),
        "vs_reference_both_fp32": lowest(found, "evaluation fp32"),
        "vs_reference_both_bf16": lowest(found, "evaluation bf16"),
    }
    for name, measures in (("training", training), ("evaluation", evaluation)):
        kind = "evaluation" if name == "evaluation" else "vs_ bf16_ peak_"
        each = {n: row for n, row in found.items() if n.startswith(tuple(kind.split()))}
        print(write(name, {**measures, "each": each}))


def lowest(found: dict[str, dict[str, Any]], prefix: str) -> dict[str, Any]:
    """Return the measurement that is least in our favour, over sizes and precisions."""
    rows = [row for name, row in found.items() if name.startswith(prefix)]
    return min(rows, key=lambda row: float(row["ratio"]))


if __name__ == "__main__":
    main()
