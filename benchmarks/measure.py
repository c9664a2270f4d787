"""Interleaved measurement: every side in turn in one process, ratios taken pair by pair."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

OUT = Path(__file__).parent / "out"

Side = Callable[[], float]
"""Does a fixed amount of work and returns how much it was (tokens, say)."""


def interleaved(sides: Mapping[str, Side], runs: int) -> dict[str, list[float]]:
    """Return each side's rate, work per second, of every counted run (one warm-up before)."""
    for work in sides.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, work in sides.items():
            begin = time.perf_counter()
            amount = work()
            rates[name].append(amount / (time.perf_counter() - begin))
    return rates


def ratio(ours: list[float], other: list[float]) -> dict[str, Any]:
    """Return the median of the pairwise ratios, with the medians of both sides."""
    pairs = [a / b for a, b in zip(ours, other, strict=True)]
    return {
        "ratio": round(statistics.median(pairs), 3),
        "ours": round(statistics.median(ours), 3),
        "other": round(statistics.median(other), 3),
        "runs": len(pairs),
        "lowest": round(min(pairs), 3),
        "highest": round(max(pairs), 3),
    }


def matmul_peak(dtype: torch.dtype, size: int = 2048, runs: int = 5) -> float:
    """Return the measured FLOP/s of a square matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    a @ b
    rates = []
    for _ in range(runs):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - begin))
    return statistics.median(rates)


def write(name: str, measures: Mapping[str, Any]) -> Path:
    """Write `benchmarks/out/<name>.json`: measures, and the machine they were taken on."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    path.write_text(json.dumps({**measures, "machine": machine}, indent=2) + "\n")
    return path


def show(title: str, rows: Mapping[str, Mapping[str, Any]], goals: Mapping[str, str]) -> None:
    """Print a table of ratios beside their goals."""
    table = Table(title=title)
    for column in ("measure", "ratio", "ours", "other", "lowest-highest", "goal"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, row in rows.items():
        spread = f"{row['lowest']}-{row['highest']}" if "lowest" in row else ""
        value = row.get("ratio", row.get("bytes", ""))
        other, ours = row.get("other", ""), row.get("ours", "")
        table.add_row(name, str(value), str(ours), str(other), spread, goals.get(name, ""))
    Console(width=110).print(table)
