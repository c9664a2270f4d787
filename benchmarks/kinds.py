"""What each kind of adapter costs against plain LoRA; run it with `python -m benchmarks.kinds`.

Eight clients train together for a round; each kind as its algorithm has it, all of rank 8. The
second figure is all clients in common passes against the same clients one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import Side, interleaved, ratio, show, write
from benchmarks.training import engine
from benchmarks.workload import BATCH, CLIENTS, RANK, SIZES, STEPS, rows
from fedllm.adapters import (
    Adapter,
    Routing,
    initial,
    is_index,
    name_core,
    name_gain,
    name_index,
    name_router,
    name_values,
)
from fedllm.engine import CohortEngine, Resident
from fedllm.federation import BaseClient, Job, Payload

_EXPERTS = 4
_DENSITY = 0.01


def plain(side: Resident, rank: int = RANK) -> Adapter:
    """LoRA."""
    return initial(side.shapes, rank, 2.0, 0)


def dual(side: Resident) -> Adapter:
    """A global and a local path (FedDPA, pFedLoRA)."""
    return plain(side).joined(plain(side).moved("local"))


def tiers(side: Resident) -> Adapter:
    """Root, cluster and leaf (HiLoRA)."""
    return (
        plain(side)
        .moved("root")
        .joined(plain(side).moved("cluster").joined(plain(side).moved("leaf")))
    )


def experts(side: Resident) -> Adapter:
    """Four experts and a router with seven outputs (FedLEASE)."""
    whole = Adapter({})
    for number in range(_EXPERTS):
        whole = whole.joined(plain(side).moved(f"expert{number}"))
    slots = tuple(f"expert{n}" for n in (*range(_EXPERTS), *(0,) * (_EXPERTS - 1)))
    routers = {name_router(m): torch.zeros(len(slots), i) for m, (_, i) in side.shapes.items()}
    return replace(whole.overlaid(routers), routing=Routing(slots, _EXPERTS))


def heads(side: Resident) -> Adapter:
    """Four frozen bases with a trained core each (RAVAN)."""
    whole = Adapter({})
    for number in range(_EXPERTS):
        whole = whole.joined(plain(side).moved(f"head{number}"))
    cores = {name_core(path): torch.zeros(RANK, RANK) for path in whole.modules}
    gains = {name_gain(path): torch.ones(()) for path in whole.modules}
    return whole.overlaid({**cores, **gains})


def sparse(side: Resident) -> Adapter:
    """One entry in a hundred of every weight (SLoRA's first stage)."""
    tensors: dict[str, torch.Tensor] = {}
    for module, (out, inner) in side.shapes.items():
        count = max(1, int(_DENSITY * out * inner))
        places = torch.randperm(out * inner, generator=torch.Generator().manual_seed(0))
        tensors[name_index(module)] = places[:count].sort().values.to(torch.int32)
        tensors[name_values(module)] = torch.zeros(count)
    return Adapter(tensors, shapes=side.shapes)


KINDS: dict[str, Callable[[Resident], Adapter]] = {
    "plain": plain,
    "dual": dual,
    "tiers": tiers,
    "experts": experts,
    "heads": heads,
    "sparse": sparse,
}


class _Trains(BaseClient):
    """Trains what the kind's algorithm trains."""

    def trainable(self, name: str, job: Job) -> bool:
        kind = job.stage
        if kind == "heads":
            return name.endswith(("core", "gain"))
        if kind == "dual":
            return ":local" in name
        if kind == "tiers":
            return ":leaf" in name
        if kind == "experts":
            return ":expert0" in name or name.endswith("router")
        return not is_index(name)


def training(side: CohortEngine, kind: str, *, together: bool = True) -> Side:
    """Return the work of training all clients for a round."""
    start = KINDS[kind](side.resident)
    job = Job(0, Payload(0, start), stage=kind, steps=STEPS, learning_rate=1e-4)
    requests = [side.fit(replace(job, cid=c), start, _Trains()) for c in range(CLIENTS)]

    def work() -> float:
        groups = [requests] if together else [[request] for request in requests]
        results = [result for group in groups for result in side.train(group)]
        return sum(result.metrics["tokens"] for result in results)

    return work


def main() -> None:
    """Measure, print and write `kinds.json`: useful training tokens a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", choices=list(SIZES), default="S")
    options = parser.parse_args()
    size = SIZES[options.size]
    side = engine(size, torch.float32, rows(CLIENTS * BATCH * STEPS, size.vocabulary), CLIENTS)
    sides: dict[str, Side] = {kind: training(side, kind) for kind in KINDS}
    sides |= {f"{kind} alone": training(side, kind, together=False) for kind in KINDS}
    rates = interleaved(sides, options.runs)
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[f"{kind} vs_plain"] = ratio(rates[kind], rates["plain"])
        found[f"{kind} vs_one_by_one"] = ratio(rates[kind], rates[f"{kind} alone"])
    show(f"size {options.size}, fp32, tokens a second", found, {})
    print(write("kinds", found))


if __name__ == "__main__":
    main()
