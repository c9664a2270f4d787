"""All benchmarks, one after another: `make bench`."""

from __future__ import annotations

import subprocess
import sys

for name in (
    "training",
    "startup",
    "passes",
    "aggregation",
    "kinds",
    "events",
    "lazy",
    "central",
    "serving",
):
    subprocess.run([sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}"], check=True)
