"""What `fedllm list` shows: the tables of names, without importing what they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from fedllm.adapters.wire import WIRE
from fedllm.algorithms import ALGORITHMS
from fedllm.algorithms.catalog import Description, describe
from fedllm.central.stages import METHODS, STAGES
from fedllm.config import AnySchedule
from fedllm.config.profiles import DEVICES, LINKS
from fedllm.config.worlds import SUMMARIES, WORLDS
from fedllm.data import PARTITIONS
from fedllm.data.builtin import BUILTIN_DATASETS
from fedllm.evaluation import BY_TASK, METRICS
from fedllm.federation.robust import ROBUST
from fedllm.models import BUILTIN_MODELS, TESTED_FAMILIES

Row = Mapping[str, Any]


def _models() -> Sequence[Row]:
    built_in = {f"builtin:{name}": entry.summary for name, entry in BUILTIN_MODELS.items()}
    families = dict.fromkeys(TESTED_FAMILIES, "tested family: give a local folder or a hub id")
    return [{"name": name, "what": what} for name, what in {**built_in, **families}.items()]


def _datasets() -> Sequence[Row]:
    files = {"name": "FILE or FOLDER", "what": "JSON, JSONL, CSV, TSV or Parquet"}
    hub = {"name": "HUB ID", "what": "a data set on the Hugging Face hub"}
    return [{"name": f"builtin:{n}", "what": w} for n, w in BUILTIN_DATASETS.items()] + [files, hub]


def _algorithms() -> Sequence[Row]:
    return [_algorithm_row(describe(name)) for name in ALGORITHMS]


def _algorithm_row(found: Description) -> Row:
    return {
        "name": found.name,
        "what": found.summary,
        "mixed_rank": found.mixed_rank,
        "personal": found.is_personal,
        "async": not found.schedules["async"],
        "optimizers": list(found.optimizers),
        "no_optimizer": found.no_optimizer,
        "schedules": dict(found.schedules),
        "settings": found.settings,
        "paper": found.paper,
    }


def _metrics() -> Sequence[Row]:
    return [
        {
            "name": name,
            "what": metric.summary,
            "needs": metric.needs,
            "better": "higher" if metric.is_higher_better else "lower",
            "tasks": [task for task, names in BY_TASK.items() if name in names],
        }
        for name, metric in METRICS.items()
    ]


def _partitions() -> Sequence[Row]:
    return [{"name": name, "what": entry.summary} for name, entry in PARTITIONS.items()]


def _codecs() -> Sequence[Row]:
    return [{"name": name, "what": entry.summary} for name, entry in WIRE.items()]


def _robust() -> Sequence[Row]:
    return [{"name": name, "what": entry.summary} for name, entry in ROBUST.items()]


def _schedules() -> Sequence[Row]:
    rows = []
    for kind in get_args(AnySchedule):
        (name,) = get_args(kind.model_fields["name"].annotation)
        reasons = {n: describe(n).schedules[name] for n in ALGORITHMS}
        what = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
        refused = {n: why for n, why in reasons.items() if why}
        rows.append({"name": name, "what": what, "not_for": [*refused], "reasons": refused})
    return rows


def _devices() -> Sequence[Row]:
    return [
        {
            "name": name,
            "what": f"{p.tflops:g} TFLOP/s at {p.utilization:.0%}, {p.memory_gb:g} GB,"
            f" {p.train_w:g} W",
            "profile": p.model_dump(),
        }
        for name, p in DEVICES.items()
    ]


def _links() -> Sequence[Row]:
    return [
        {
            "name": name,
            "what": f"{_rates(p.downlink_mbps)} down, {_rates(p.uplink_mbps)} up,"
            f" {p.latency_ms:g} ms",
            "profile": p.model_dump(),
        }
        for name, p in LINKS.items()
    ]


def _rates(rate: Any) -> str:
    return f"{rate.low:g} to {rate.high:g} Mbit/s"


def _worlds() -> Sequence[Row]:
    return [{"name": n, "what": text, "system": WORLDS[n]} for n, text in SUMMARIES.items()]


def _stages() -> Sequence[Row]:
    return [
        {"name": name, "what": stage.summary, "rows": stage.wanted, "trainer": stage.trainer}
        for name, stage in STAGES.items()
    ]


def _methods() -> Sequence[Row]:
    return [{"name": name, "what": what, "set": words} for name, (what, words) in METHODS.items()]


SUBJECTS: Mapping[str, Callable[[], Sequence[Row]]] = {
    "models": _models,
    "datasets": _datasets,
    "algorithms": _algorithms,
    "metrics": _metrics,
    "partitions": _partitions,
    "codecs": _codecs,
    "robust": _robust,
    "schedules": _schedules,
    "devices": _devices,
    "links": _links,
    "worlds": _worlds,
    "stages": _stages,
    "methods": _methods,
}
"""What can be listed; each row has a `name` and `what` it is."""
