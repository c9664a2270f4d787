"""From what went wrong to one clear message and an exit code: 2 for errors, 130 for Ctrl-C."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from fedllm.errors import FedLLMError, TrainingError

if TYPE_CHECKING:
    from fedllm.cli.course import Course

WRONG, CRASHED, STOPPED = 2, 1, 130
"""Exit codes: the user's to mend, ours to mend, Ctrl-C."""


def tell(message: str, style: str = "red") -> None:
    """Write a message to stderr, its first word in colour, without wrapping paths."""
    head, colon, rest = message.partition(": ")
    text = Text.assemble((head + colon, style), rest)
    Console(stderr=True).print(text, soft_wrap=True, highlight=False)


@contextmanager
def reported(course: Course | None = None) -> Iterator[None]:
    """Turn exceptions into messages and exit codes.

    Args:
        course: Of the run under way, if there is one: then the message says how to go on.

    Raises:
        typer.Exit: In place of any other exception.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        tell(_stopped(course), "yellow")
        raise typer.Exit(STOPPED) from None
    except FedLLMError as error:
        tell(f"error: {error}")
        _tell_rest(course, error)
        raise typer.Exit(WRONG) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if _is_full(error):
            where = getattr(error, "filename", None)
            at = f" for {where}" if where else ""
            tell(f"error: No space is left on the device{at}. Free some and try again.")
        else:
            sys.stderr.write(traceback.format_exc())
        _tell_rest(course, error)
        raise typer.Exit(WRONG if _is_full(error) else CRASHED) from None


def nearby_examples(path: Path) -> str:
    """Return a sentence that names configurations near a path that does not exist."""
    folders = dict.fromkeys((path.parent, Path(), Path("examples")))
    found = [file for folder in folders if folder.is_dir() for file in _yaml_files(folder)]
    if not found:
        return ""
    names = {file.name: str(file) for file in reversed(found)}
    near = difflib.get_close_matches(path.with_suffix(".yaml").name, names, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {names[near[0]]}?"
    return " There is: " + ", ".join(str(file) for file in found[:6])


def quiet_libraries() -> None:
    """Let only our own words reach the user: libraries warn about what our errors say better."""
    warnings.simplefilter("ignore")
    # they read these when they are first imported, which is long after this
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("fedllm").addHandler(_Notes(logging.WARNING))


class _Notes(logging.Handler):
    """Shows warnings of ours; errors are told by `reported`."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            tell(f"note: {record.getMessage()}", "yellow")


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in {".yaml", ".yml"})


def _stopped(course: Course | None) -> str:
    if course is None:
        return "stopped"
    if course.run is None:
        return f"stopped while {course.doing}; nothing was written"
    if course.rounds_done >= course.rounds:
        return f"stopped after the last round; {_saved(course)}"
    return f"stopped in round {course.round_number}; {_saved(course)}"


def _saved(course: Course) -> str:
    """Say what is saved, and how to go on from there."""
    from fedllm.results import latest_checkpoint

    assert course.run is not None
    checkpoint = latest_checkpoint(course.run)
    last = int(checkpoint.name) if checkpoint else 0
    what = {0: "no round is saved yet", 1: "round 1 is saved"}
    state = what.get(last, f"rounds 1-{last} are saved")
    return f"{state}; continue with: fedllm run --resume {course.run.path}"


def _tell_rest(course: Course | None, error: Exception) -> None:
    """Say how to go on with a run that had begun, unless the message does so already."""
    if course is None or course.run is None or "--resume" in str(error):
        return
    path = course.run.path
    if isinstance(error, TrainingError):
        tell(f"The records up to round {course.rounds_done} are in {path}. A resumed run keeps its"
             " settings, so start the changed one under another name=...", "yellow")  # fmt: skip
    else:
        tell(_saved(course), "yellow")


def _is_full(error: BaseException | None) -> bool:
    """Tell whether a full disk is behind an error; safetensors says so only in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
