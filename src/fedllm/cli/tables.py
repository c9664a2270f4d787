"""What `fedllm list` shows: the tables of names, without importing what they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedllm.adapters.wire import WIRE
from fedllm.algorithms import ALGORITHMS
from fedllm.algorithms.catalog import Description, describe
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
        "optimizers": list(found.optimizers),
        "no_optimizer": found.no_optimizer,
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


SUBJECTS: Mapping[str, Callable[[], Sequence[Row]]] = {
    "models": _models,
    "datasets": _datasets,
    "algorithms": _algorithms,
    "metrics": _metrics,
    "partitions": _partitions,
    "codecs": _codecs,
    "robust": _robust,
}
"""What can be listed; each row has a `name` and `what` it is."""
