"""The tables of a report; all text of a run is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedllm.results.history import History
from fedllm.results.summary import MetricRow
from fedllm.results.timeline import OUTCOMES, Timeline, gini

_MAX_ROUNDS = 200
"""Rows of the table of rounds; of more, some are left out evenly."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that scrolls sideways where the screen is narrow."""

    def row(cells: Sequence[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{row(head, "th")}{body}</table></div>'


def metrics(found: Sequence[MetricRow]) -> str:
    """Tell the first, last and best value of every metric and view."""
    rows = [
        (r.metric, r.view, f"{r.first:.4g}", f"{r.last:.4g}", f"{r.best:.4g}", r.best_round)
        for r in found
    ]
    return table(("metric", "of", "first", "last", "best", "round"), rows)


def fairness(history: History, course: Timeline, num_clients: int) -> str:
    """Tell how the best and the worst tenth of clients fare, and how much each contributes."""
    metric, rows = history.main_metric, []
    if metric is not None:
        for part, what in (("clients", "the global model"), ("personal", "its own model")):
            values = list(history.by_client(part, metric).values())
            if values:
                rows.append((f"{metric} of {what} on its own rows", *_tenths(values)))
    if course.has_time:
        found = course.participation(num_clients)
        for what, counts in (("jobs", found.jobs), ("used updates", found.used)):
            rows.append((f"{what} of a client", *_tenths([*counts, *[0] * found.never_seen])))
    head = ("", "clients", "mean", "lowest tenth", "highest tenth", "Gini")
    return table(head, rows) if rows else ""


def _tenths(values: Sequence[float]) -> tuple[object, ...]:
    """Return count, mean, mean of the lowest and of the highest tenth, and the Gini coefficient."""
    ranked = sorted(values)
    tenth = max(len(ranked) // 10, 1)
    parts = (ranked, ranked[:tenth], ranked[-tenth:])
    mean, low, high = (f"{sum(own) / len(own):.4g}" for own in parts)
    return len(ranked), mean, low, high, f"{gini(ranked):.3f}"


def jobs(course: Timeline) -> str:
    """Tell how jobs ended, and what work went into them."""
    if not course.has_time:
        return ""
    spent, joules = course.seconds_by_outcome(), course.joules_by_outcome()
    rows = [
        (key, OUTCOMES.get(key, ""), n, f"{spent[key] / 3600:.3g}", f"{joules[key] / 1e3:.3g}")
        for key, n in course.outcomes.items()
    ]
    return table(("outcome", "because", "jobs", "client-hours", "kJ"), rows)


def rounds(history: History) -> str:
    """Tell each round, or of many some evenly and the last; a column without values is left out."""
    records = history.records
    step = -(-len(records) // _MAX_ROUNDS) or 1
    found = [_round(record, history.main_metric) for record in records[::-1][::step][::-1]]
    shown = [key for key in (found[0] if found else ()) if any(row[key] != "" for row in found)]
    told = f"<p>One round in {step} is shown.</p>" if step > 1 else ""
    return told + table(shown, [[row[key] for key in shown] for row in found])


def _round(record: Mapping[str, Any], metric: str | None) -> dict[str, object]:
    evaluation = record.get("eval") or {}
    view = evaluation.get("global") or (evaluation.get("personal") or {}).get("mean") or {}
    train, sent = record.get("train") or {}, record.get("bytes") or {}
    late, time_s = record.get("staleness") or {}, record.get("virtual_time_s") or 0.0
    ends = record.get("jobs") or {}
    lost = sum(count for outcome, count in ends.items() if outcome != "arrived")
    return {
        "round": record["round"],
        "virtual hours": f"{time_s / 3600:.3g}" if time_s else "",
        metric or "": _short(view.get(metric)),
        "train loss": _short(train.get("loss")),
        "MB up": f"{sent.get('up', 0) / 1e6:.2f}",
        "MB down": f"{sent.get('down', 0) / 1e6:.2f}",
        "updates": len(train.get("clients", ())),
        "lost": lost or "",
        "versions late": f"{late['mean']:.1f}" if late.get("max") else "",
        "kJ": f"{record['energy_j'] / 1e3:.3g}" if record.get("energy_j") else "",
    }


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
