"""One HTML file that tells a run: figures to zoom into, tables, nothing fetched from outside."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fedllm.errors import RunError
from fedllm.results import report_figures as draw
from fedllm.results import report_tables as tables
from fedllm.results.history import History
from fedllm.results.run_dir import CONFIG_FILE, RunDir
from fedllm.results.storage import explained, write_text
from fedllm.results.summary import Overview, overview, summary_rows
from fedllm.results.time_plots import time_unit
from fedllm.results.timeline import USED, Timeline

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';\
 img-src data: blob:; form-action 'none'; base-uri 'none'"
"""What a browser may load: what stands in the page."""
_PLOTLY = {
    "responsive": True,
    "displaylogo": False,
    # plotly offers to send a figure's data to its own server; nothing of a run leaves the page
    "showSendToCloud": False,
    "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
}
_CSS = """
:root { color-scheme: light dark; --edge: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h1, p { overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.card { border: 1px solid var(--edge); border-radius: .5rem; padding: .5rem .8rem; }
.card b { display: block; font-size: 1.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--edge); }
td:first-child, th:first-child { text-align: left; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def write_report(run: RunDir, to: Path | None = None) -> Path:
    """Write the report of a run, whether it goes on or has ended.

    Args:
        run: Only read.
        to: Where; by default `report.html` in the run's folder, which is made anew each time.

    Raises:
        RunError: If another file is there, or nothing can be written.
        ConfigError: If the run's configuration is not one of this version's.
    """
    own = run.path / "report.html"
    path = own if to is None else to
    if path.is_dir():
        raise RunError(f"{path} is a folder; give the name of a file, such as {path / 'run.html'}")
    if path.exists() and path.resolve() != own.resolve():
        raise RunError(f"{path} exists, and nothing is overwritten; choose another name")
    with explained(path, "The run itself is untouched."):
        write_text(path, page(run))
    return path


def page(run: RunDir) -> str:
    """Return the whole page; text of the run is escaped, and the script stands in the page."""
    facts, history, course = overview(run), History.of(run), Timeline.of(run)
    clients = facts.num_clients
    figures = {
        "Quality": draw.quality(history, "round"),
        "Quality over virtual time": draw.quality(history, "virtual_time_s"),
        "Quality for bytes": draw.quality(history, "bytes"),
        "Quality for energy": draw.quality(history, "energy_total_j"),
        "What clients did": draw.gantt(course),
        "Who contributed": draw.participation(course, clients),
        "How much of their time clients work": draw.utilisation(course),
        "What work came to": draw.outcomes(course),
        "How late updates were": draw.staleness(course),
    }
    sections = {
        **{title: _div(found, number) for number, (title, found) in enumerate(figures.items())},
        "Metrics": tables.metrics(summary_rows(run)),
        "Fairness": tables.fairness(history, course, clients),
        "Jobs": tables.jobs(course),
        "Rounds": tables.rounds(history),
        "Configuration": _file(run.path / CONFIG_FILE),
        "Environment": _file(run.path / "environment.json"),
    }
    title = html.escape(facts.name)
    body = "".join(f"<h2>{head}</h2>{inside}" for head, inside in sections.items() if inside)
    top = f"<h1>{title}</h1>{_subtitle(facts)}{_cards(facts, history, course)}"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{title}</title><style>{_CSS}</style>"
    head += f"<script>{get_plotlyjs()}</script>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{top}{body}</body></html>\n"


def _div(figure: Any, number: int) -> str:
    if figure is None:
        return ""
    inside = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"plot{number}", config=_PLOTLY
    )  # fmt: skip
    return f'<div class="plot">{inside}</div>'


def _subtitle(facts: Overview) -> str:
    words = [facts.algorithm, facts.model, facts.data, facts.partition, f"seed {facts.seed}"]
    if facts.ended:
        words.append(f"ended early: {facts.ended}")
    elif not facts.is_finished:
        words.append("goes on, or was stopped")
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
        shown["energy of clients"] = f"{facts.energy_j / 1e3:.3g} kJ"
        spent = course.seconds_by_outcome()
        total = sum(spent.values())
        shown["work that was used"] = f"{spent.get(USED, 0.0) / total:.0%}" if total else "-"
    shown["sent up"] = f"{facts.bytes_up / 1e6:.1f} MB"
    shown["sent down"] = f"{facts.bytes_down / 1e6:.1f} MB"
    shown["clients"] = str(facts.num_clients)
    cards = "".join(
        f'<div class="card">{html.escape(key)}<b>{html.escape(value)}</b></div>'
        for key, value in shown.items()
    )
    return f'<div class="cards">{cards}</div>'


def _file(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return f"<pre>{html.escape(text)}</pre>"
