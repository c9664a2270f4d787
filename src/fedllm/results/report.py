"""One HTML file that tells a run: figures to zoom into, tables, nothing fetched from outside."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fedllm.results import report_figures as draw
from fedllm.results.history import History
from fedllm.results.run_dir import CONFIG_FILE, RunDir
from fedllm.results.storage import explained, write_text
from fedllm.results.summary import Overview, overview, summary_rows
from fedllm.results.time_plots import time_unit
from fedllm.results.timeline import OUTCOMES, Timeline, gini

_MAX_ROUNDS = 200
"""Rows of the table of rounds; of more, some are left out evenly."""
_CSS = """
:root { color-scheme: light dark; --edge: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.card { border: 1px solid var(--edge); border-radius: .5rem; padding: .5rem .8rem; }
.card b { display: block; font-size: 1.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--edge); }
td:first-child, th:first-child { text-align: left; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; }
.plot { background: #fff; border-radius: .5rem; margin: .8rem 0; }
"""


def write_report(run: RunDir, to: Path | None = None) -> Path:
    """Write the report of a run, whether it goes on or has ended.

    Args:
        run: Only read.
        to: Where; by default `report.html` in the run's folder, which is made anew each time.

    Raises:
        RunError: If another file is there, or nothing can be written.
    """
    from fedllm.errors import RunError

    path = run.path / "report.html" if to is None else to
    if to is not None and to.exists():
        raise RunError(f"{to} exists, and nothing is overwritten; choose another name")
    with explained(path, "The run itself is untouched."):
        write_text(path, page(run))
    return path


def page(run: RunDir) -> str:
    """Return the whole page; text of the run is escaped, and the script stands in the page."""
    facts, history, course = overview(run), History.of(run), Timeline.of(run)
    figures = [
        ("Quality", draw.quality(history, "round")),
        ("Quality over virtual time", draw.quality(history, "virtual_time_s")),
        ("Quality for bytes", draw.quality(history, "bytes")),
        ("Quality for energy", draw.quality(history, "energy_total_j")),
        ("What clients did", draw.gantt(course)),
        ("Who contributed", draw.participation(course, facts.num_clients)),
        ("What work came to", draw.outcomes(course)),
        ("How late updates were", draw.staleness(course)),
    ]
    parts = [
        f"<h1>{html.escape(facts.name)}</h1>",
        _subtitle(facts),
        _cards(facts, history, course),
    ]
    for number, (title, figure) in enumerate(figures):
        if figure is not None:
            parts.append(f"<h2>{title}</h2>{_div(figure, number)}")
    parts += ["<h2>Metrics</h2>", _metrics(run), _fairness(history), _outcome_table(course)]
    parts += ["<h2>Rounds</h2>", _rounds(history), "<h2>Configuration</h2>"]
    parts += [
        _file(run.path / CONFIG_FILE),
        "<h2>Environment</h2>",
        _file(run.path / "environment.json"),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">\
<title>{html.escape(facts.name)}</title><style>{_CSS}</style><script>{get_plotlyjs()}</script>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _div(figure: Any, number: int) -> str:
    inside = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"plot{number}",
        config={"responsive": True, "displaylogo": False},
    )  # fmt: skip
    return f'<div class="plot">{inside}</div>'


def _subtitle(facts: Overview) -> str:
    words = (facts.algorithm, facts.model, facts.data, facts.partition, f"seed {facts.seed}")
    return f"<p>{' · '.join(html.escape(word) for word in words)}</p>"


def _cards(facts: Overview, history: History, course: Timeline) -> str:
    shown = {"round": f"{facts.rounds_done} of {facts.rounds_planned}"}
    metric = history.main_metric
    if metric is not None:
        for view in ("global", "personal mean"):
            series = history.evaluated(view, metric)
            if series:
                shown[f"{metric}, {view}"] = f"{series.values[-1]:.4g}"
    if course.has_time:
        unit, name = time_unit(course.end_s)
        shown["virtual time"] = f"{course.end_s / unit:.1f} {name}"
        joules = sum(row["energy_j"] for row in course.ledger)
        shown["energy of clients"] = f"{joules / 1e3:.3g} kJ"
    shown["sent up"] = f"{facts.bytes_up / 1e6:.1f} MB"
    shown["sent down"] = f"{facts.bytes_down / 1e6:.1f} MB"
    shown["clients"] = str(facts.num_clients)
    cards = "".join(
        f'<div class="card">{html.escape(key)}<b>{html.escape(value)}</b></div>'
        for key, value in shown.items()
    )
    return f'<div class="cards">{cards}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def row(cells: Sequence[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{row(head, "th")}{body}</table></div>'


def _metrics(run: RunDir) -> str:
    rows = [
        (r.metric, r.view, f"{r.first:.4g}", f"{r.last:.4g}", f"{r.best:.4g}", r.best_round)
        for r in summary_rows(run)
    ]
    return _table(("metric", "of", "first", "last", "best", "round"), rows)


def _fairness(history: History) -> str:
    """Tell how the best and the worst tenth of clients fare."""
    metric = history.main_metric
    if metric is None:
        return ""
    rows = []
    for part in ("clients", "personal"):
        values = sorted(history.by_client(part, metric).values())
        if values:
            tenth = max(len(values) // 10, 1)
            ends = (values[:tenth], values[-tenth:], values)
            low, high, mean = (f"{sum(own) / len(own):.4g}" for own in ends)
            rows.append((part, len(values), mean, low, high, f"{gini(values):.3f}"))
    head = ("model on own rows", "clients", "mean", "lowest tenth", "highest tenth", "Gini")
    return "<h2>Fairness</h2>" + _table(head, rows) if rows else ""


def _outcome_table(course: Timeline) -> str:
    if not course.has_time:
        return ""
    spent = course.seconds_by_outcome()
    rows = [
        (key, OUTCOMES.get(key, ""), count, f"{spent.get(key, 0.0) / 3600:.3g}")
        for key, count in course.outcomes.items()
    ]
    return "<h2>Jobs</h2>" + _table(("outcome", "because", "jobs", "client-hours"), rows)


def _rounds(history: History) -> str:
    records = history.records
    step = -(-len(records) // _MAX_ROUNDS) or 1
    metric = history.main_metric or ""
    rows = []
    for record in (r for i, r in enumerate(records) if i % step == 0 or i == len(records) - 1):
        found = ((record.get("eval") or {}).get("global") or {}).get(metric)
        train, sent = record.get("train") or {}, record.get("bytes") or {}
        late = record.get("staleness") or {}
        rows.append(
            (
                record["round"],
                f"{record.get('virtual_time_s', 0.0) / 3600:.3g}",
                "" if found is None else f"{found:.4g}",
                f"{train['loss']:.4g}" if train.get("loss") is not None else "",
                f"{sent.get('up', 0) / 1e6:.2f}",
                len(train.get("clients", ())),
                f"{late['mean']:.1f}" if late else "",
            )
        )
    head = ("round", "hours", metric, "train loss", "MB up", "updates", "versions late")
    return _table(head, rows)


def _file(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return f"<pre>{html.escape(text)}</pre>"
