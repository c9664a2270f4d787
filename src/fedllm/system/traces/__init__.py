"""Availability, capacity and link traces: our own format, and importers of others'."""

from fedllm.system.traces.formats import FORMATS, TraceFormat, import_trace
from fedllm.system.traces.generate import BEHAVIOURS, generate, write_as
from fedllm.system.traces.own_format import Record, make_way, read_record, write_record
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import WindowTrace

__all__ = [
    "BEHAVIOURS",
    "FORMATS",
    "Problems",
    "Record",
    "TraceFormat",
    "WindowTrace",
    "generate",
    "import_trace",
    "make_way",
    "read_record",
    "write_as",
    "write_record",
]
