"""Run directories, checkpoints, exports, tables and plots.

`fedllm.results.plots` is imported by those who draw: it brings matplotlib along.
"""

from fedllm.results.artifact import Artifact, find_artifact
from fedllm.results.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from fedllm.results.export import merge_into, new_folder, write_model
from fedllm.results.history import VIEWS, History, Series
from fedllm.results.run_dir import RecordFile, RunDir, is_central_run, resume_command
from fedllm.results.storage import strict_json
from fedllm.results.summary import MetricRow, Overview, overview, summary_rows

__all__ = [
    "VIEWS",
    "Artifact",
    "History",
    "MetricRow",
    "Overview",
    "RecordFile",
    "RunDir",
    "Series",
    "find_artifact",
    "is_central_run",
    "latest_checkpoint",
    "load_checkpoint",
    "merge_into",
    "new_folder",
    "overview",
    "resume_command",
    "save_checkpoint",
    "strict_json",
    "summary_rows",
    "write_model",
]
