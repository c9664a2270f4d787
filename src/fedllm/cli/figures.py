"""Numbers as people read them: bytes, seconds, shares and small courses over rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def bytes_text(count: float) -> str:
    """Return bytes in decimal units, as networks count them.

    >>> bytes_text(1_250_000)
    '1.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_text(count: float) -> str:
    """Return a large count shortly.

    >>> count_text(1_820_352)
    '1.8 M'
    """
    for unit in ("", " k", " M", " G", " T"):
        if abs(count) < 999.5:
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} P"


def duration_text(seconds: float) -> str:
    """Return a duration with the two units that matter.

    >>> [duration_text(s) for s in (0.42, 4.25, 75, 7500)]
    ['0.4 s', '4.2 s', '1:15', '2 h 05']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600} h {whole % 3600 // 60:02d}"


def clock_text(seconds: float) -> str:
    """Return a running clock, whose width changes seldom.

    >>> clock_text(75)
    '1:15'
    """
    whole = int(seconds)
    head = f"{whole // 3600}:{whole % 3600 // 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{head}:{whole % 60:02d}"


def value_text(value: float | None) -> str:
    """Return a metric's value with three decimals, fewer for large ones; a dash for none.

    >>> [value_text(v) for v in (0.41234, 12.3456, 1234.5, None)]
    ['0.412', '12.35', '1234', '-']
    """
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return the course of the values as blocks, the lowest value lowest.

    Args:
        values: In order; those that are not finite are left out.
        width: Most blocks; more values are thinned evenly, the last one is always shown.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    """
    known = [value for value in values if math.isfinite(value)]
    if len(known) > width:
        known = [known[round(i * (len(known) - 1) / (width - 1))] for i in range(width)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in known)
