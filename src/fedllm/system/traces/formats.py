"""Which format a trace file is in, and reading it whichever that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from fedllm.errors import DataError
from fedllm.system.traces.fedscale import read_fedscale
from fedllm.system.traces.flash import Policy, read_flash
from fedllm.system.traces.own_format import FORMAT, Record, read_record
from fedllm.system.traces.plato import read_plato
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import Unknown

TraceFormat = Literal["flash", "fedscale", "plato", "ours"]
FORMATS: Mapping[TraceFormat, str] = {
    "flash": "FLASH's state_traces.json: what phones reported",
    "fedscale": "FedScale's pickles of behaviour or capacity",
    "plato": "lists of transitions, `client: on, [54, 890]`",
    "ours": "one row a window, JSON lines or Parquet",
}
_HEAD_BYTES = 4096


def import_trace(
    path: Path,
    kind: TraceFormat | Literal["auto"] = "auto",
    *,
    policy: Policy = "flash",
    time_zone: str = "UTC",
    unknown: Unknown | None = None,
    malformed: float = 0.05,
) -> tuple[Record, Problems]:
    """Read a trace of any format.

    Args:
        path: The file.
        kind: Its format; `auto` looks at how it begins.
        policy: For FLASH: when a phone counts as there.
        time_zone: For FLASH: where its clocks are, such as `Asia/Shanghai`.
        unknown: What holds where nothing is known of a client; by default as the trace says.
        malformed: Largest share of lines that may be wrong.

    Raises:
        DataError: If the file is not there, of no known format, or too much of it is wrong.
    """
    chosen = recognised(path) if kind == "auto" else kind
    readers: Mapping[str, Callable[[], tuple[Record, Problems]]] = {
        "flash": lambda: read_flash(path, policy, time_zone),
        "fedscale": lambda: read_fedscale(path),
        "plato": lambda: read_plato(path),
        "ours": lambda: read_record(path),
    }
    record, problems = readers[chosen]()
    problems.check(malformed)
    if unknown is not None:
        record.unknown = unknown
    return record, problems


def recognised(path: Path) -> TraceFormat:
    """Return the format of a file, by how it begins.

    Raises:
        DataError: If the file is not there, or begins like none of them.
    """
    if not path.is_file():
        raise DataError(f"there is no trace {path}; check the path")
    with path.open("rb") as data:
        head = data.read(_HEAD_BYTES)
    if head.startswith(b"PAR1") or FORMAT.encode() in head:
        return "ours"
    if head.startswith(b"\x80") or path.suffix in (".pkl", ".pickle"):
        return "fedscale"
    text = head.decode("utf-8", errors="replace")
    if '"messages"' in text:
        return "flash"
    if ": on" in text or ": off" in text or '["on"' in text or '["off"' in text:
        return "plato"
    raise DataError(
        f"{path} begins like none of the known formats; say which it is with --format"
        f" {', '.join(FORMATS)}"
    )
