"""What `fedllm list` shows: the tables of names, without importing what they name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

from fedllm.algorithms import ALGORITHMS, server_class, settings_of
from fedllm.data import PARTITIONS
from fedllm.data.builtin import BUILTIN_DATASETS
from fedllm.evaluation import BY_TASK, METRICS
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
    rows: list[Row] = []
    for name, entry in ALGORITHMS.items():
        cls = server_class(name)
        defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
        rows.append(
            {
                "name": name,
                "what": entry.summary,
                "mixed_rank": cls.mixed_rank,
                "personal": cls.is_personal,
                "settings": {
                    key: {"type": _type_text(kind), "default": defaults.get(key)}
                    for key, kind in settings_of(cls).items()
                },
                "paper": _paper(name),
            }
        )
    return rows


def _paper(name: str) -> str:
    """Return the paper that the algorithm's file names."""
    doc = inspect.getdoc(ALGORITHMS.load(name)) or ""
    _, _, rest = doc.partition("Paper:")
    lines: list[str] = []
    for line in rest.splitlines():
        if lines and not line.startswith(" "):
            break
        lines.append(line.strip())
    return " ".join(lines)


def _type_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    base = getattr(kind, "__origin__", kind)
    return getattr(base, "__name__", str(base))


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


SUBJECTS: Mapping[str, Callable[[], Sequence[Row]]] = {
    "models": _models,
    "datasets": _datasets,
    "algorithms": _algorithms,
    "metrics": _metrics,
    "partitions": _partitions,
}
"""What can be listed; each row has a `name` and `what` it is."""
