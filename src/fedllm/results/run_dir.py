"""The run directory: all that is known of a run, and the only thing other parts read of it.

    runs/<name>/  config.yaml  environment.json  heterogeneity.json  log.txt
                  metrics.jsonl  events.jsonl  ledger.jsonl  timing.jsonl
                  checkpoints/<version>/  predictions/<version>.jsonl  plots/*.png

Metrics, events and ledger are the same bit for bit for the same configuration and seed. Seconds
by the clock differ each time and go to timing.jsonl and log.txt alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from fedllm.errors import RunError
from fedllm.results.environment import environment
from fedllm.results.storage import atomic_folder, explained, strict_json, write_text

RecordFile = Literal["metrics", "events", "ledger", "timing", "trainer_log"]
"""The files to which a run adds one JSON line after another."""

CONFIG_FILE = "config.yaml"


def is_central_run(path: Path) -> bool:
    """Tell a central run from a federated one by its configuration, be it damaged elsewhere."""
    try:
        lines = (path / CONFIG_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.startswith("stage:") for line in lines)


def resume_command(path: Path) -> str:
    """Return the command that continues a run, federated or central."""
    return f"fedllm {'train' if is_central_run(path) else 'run'} --resume {path}"


class RunDir:
    """A run directory, made by `create` or found by `open`.

    Any number of processes may read one; the first write takes a lock that only one process can
    hold until `close`, the end of a `with` block, or its death.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unlock: weakref.finalize[[int], RunDir] | None = None

    @classmethod
    def create(cls, path: Path, config_yaml: str) -> Self:
        """Make the directory of a new run, locked, with its configuration and environment.

        Raises:
            RunError: If something is at `path` already, or it cannot be written.
        """
        if path.exists():
            raise RunError(
                f"{path} exists, and a run is never overwritten. Choose another name=..., or"
                f" continue that run with: {resume_command(path)}"
            )
        described = json.dumps(environment(), indent=2)
        with explained(path, "Nothing was written."), atomic_folder(path) as folder:
            (folder / CONFIG_FILE).write_text(config_yaml, encoding="utf-8")
            (folder / "environment.json").write_text(described + "\n", encoding="utf-8")
        run = cls(path)
        run.lock()
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Find a run that was made before.

        Raises:
            RunError: If `path` is not a run directory.
        """
        if not (path / CONFIG_FILE).is_file():
            state = f"it has no {CONFIG_FILE}" if path.exists() else "there is no such folder"
            raise RunError(
                f"{path} is not a run directory: {state}. Give the folder that `fedllm run` or"
                " `fedllm train` made, such as runs/demo"
            )
        return cls(path)

    def lock(self) -> None:
        """Make this the only process that writes here; each write does so if need be.

        Raises:
            RunError: If another process holds the lock, or the directory is not writable.
        """
        if self._unlock is not None and self._unlock.alive:
            return
        with explained(self.path, "Nothing was changed."):
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # the system lets go of it when the process ends, however it ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise RunError(
                f"{self.path} is being written by another process. Wait for it to end, or stop it,"
                " before you resume this run"
            ) from None
        self._unlock = weakref.finalize(self, os.close, handle)

    def close(self) -> None:
        """Let other processes write."""
        if self._unlock is not None:
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, file: RecordFile, records: Iterable[Mapping[str, Any]]) -> None:
        """Add one JSON line a record, keys sorted; NaN and infinities become null.

        Raises:
            RunError: If the file cannot be written or the run is locked by another process.
        """
        self.lock()
        data = "".join(strict_json(record) + "\n" for record in records).encode()
        path = self._file(file)
        with explained(path, self._safe()), path.open("ab") as out:
            out.write(data)

    def read(self, file: RecordFile) -> list[dict[str, Any]]:
        """Return the records of a file; none if it is not there, nor a torn last line.

        Raises:
            RunError: If a line before the last is damaged.
        """
        path = self._file(file)
        if not path.exists():
            return []
        # what follows the last newline is nothing, or a record that is not fully there
        *lines, _ = path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise RunError(
                    f"{path}, line {number}: not JSON ({error}). If the run was cut off by a power"
                    f" failure, `{resume_command(self.path)}` goes back to its last checkpoint"
                ) from None
        return records

    def lengths(self) -> dict[str, int]:
        """Return the bytes of each record file, after making sure that they are on the disk.

        A checkpoint holds them; `truncate` goes back to them.
        """
        sizes = {}
        for file in get_args(RecordFile):
            path = self._file(file)
            if path.exists():
                with explained(path, self._safe()), path.open("rb") as data:
                    os.fsync(data.fileno())
                    sizes[file] = os.fstat(data.fileno()).st_size
        return sizes

    def truncate(self, lengths: Mapping[str, int]) -> None:
        """Cut the record files back to a checkpoint's lengths; a file not named becomes empty.

        Raises:
            RunError: If a file is shorter than that: part of the run is missing.
        """
        self.lock()
        for file in get_args(RecordFile):
            path, wanted = self._file(file), lengths.get(file, 0)
            size = path.stat().st_size if path.exists() else 0
            if size < wanted:
                raise RunError(
                    f"{path} holds {size} bytes where the checkpoint knows of {wanted}: records of"
                    " the run are missing, so it cannot be resumed. Restore the file from a copy,"
                    " or start the run again under another name=..."
                )
            if size > wanted:
                with explained(path, self._safe()):
                    os.truncate(path, wanted)

    def write(self, name: str, text: str) -> Path:
        """Write a whole file, or none of it, and return its path.

        Args:
            name: Path inside the run directory, such as `predictions/3.jsonl`.
            text: What the file will hold.
        """
        self.lock()
        path = self.path / name
        with explained(path, self._safe()):
            write_text(path, text)
        return path

    def _file(self, file: str) -> Path:
        return self.path / f"{file}.jsonl"

    def _safe(self) -> str:
        return (
            "Everything up to the last checkpoint is safe; then continue with:"
            f" {resume_command(self.path)}"
        )
