"""A central run from start, or from its last checkpoint, to its end."""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

from fedllm.central.checkpoints import complete_checkpoints, read_mark
from fedllm.central.parts import Parts, build
from fedllm.central.processes import agreed, barrier, join, world_size
from fedllm.central.recording import CentralWatch, Recorder
from fedllm.central.run_config import config_of
from fedllm.central.stages import check_installed
from fedllm.config import CentralConfig, dump
from fedllm.errors import RunError
from fedllm.results import RunDir
from fedllm.results.export import new_folder
from fedllm.results.run_log import logging_to
from fedllm.starting import uncollected

logger = logging.getLogger(__name__)


def train(config: CentralConfig, watch: CentralWatch) -> Path:
    """Carry out a new run and return its directory.

    Raises:
        RunError: If the run directory exists.
        FedLLMError: If something the user can mend is wrong.
    """
    check_installed(config)
    join(config.model.device)
    agreed(lambda: _refuse_existing(config.run_dir))
    with uncollected():
        parts = build(config, watch.say)
    directory = agreed(lambda: RunDir.create(config.run_dir, dump(config)))
    return _carry_out(parts, directory, config.run_dir, None, watch)


def resume(path: Path, watch: CentralWatch) -> Path:
    """Continue a run from its last complete checkpoint, as if nothing had happened.

    Raises:
        RunError: If there is no central run at `path`, it has ended, or another process works on
            it.
    """
    config = config_of(path)
    check_installed(config)
    join(config.model.device)
    directory = agreed(lambda: _locked(path))
    with uncollected():
        parts = build(config, watch.say)
    found = complete_checkpoints(path)
    return _carry_out(parts, directory, path, found[-1] if found else None, watch)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise RunError(
            f"{path} exists, and a run is never overwritten. Choose another name=..., or continue"
            f" that run with: fedllm train --resume {path}"
        )


def _locked(path: Path) -> RunDir:
    """Open a run for writing, and clear away what a killed process left behind."""
    directory = RunDir.open(path)
    for name in ("adapter", "model"):
        if (path / name).exists():
            raise RunError(
                f"{path} has ended: {path / name} is there. Start another run under another"
                " name=..."
            )
    directory.lock()
    whole = complete_checkpoints(path)
    for folder in (path / "checkpoints").glob("checkpoint-*"):
        if folder not in whole:
            shutil.rmtree(folder)
    return directory


def _carry_out(
    parts: Parts, directory: RunDir | None, path: Path, checkpoint: Path | None, watch: CentralWatch
) -> Path:
    """Train, evaluate and write the result."""
    with uncollected():
        from fedllm.central.packed import layout
        from fedllm.central.trainers import make_trainer, quiet_trainer

    logged = nullcontext() if directory is None else logging_to(directory)
    with directory or nullcontext(), logged:
        flat = layout(parts.config, parts.tuned)
        folder = path / "checkpoints"
        recorder = Recorder(parts, directory, path, watch)
        _restore(recorder, checkpoint, directory, watch)
        with uncollected():
            trainer = make_trainer(
                parts.config, parts.tuned, parts.train, parts.test, folder, parts.where, flat
            )
        recorder.trainer = trainer
        if directory is not None:
            trainer.loss_sum = recorder.course.loss * world_size()
            trainer.seen = list(recorder.course.rows)
        trainer.add_callback(recorder)
        _without_printing(trainer)
        barrier()
        watch.ready()
        with quiet_trainer():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if recorder.load_best() and directory is not None:
            kept = f"the weights of step {recorder.course.best_step} are kept"
            logger.info(kept)
            watch.say(kept)
        watch.say("evaluating on all test rows")
        recorder.finish(trainer.state)
        if directory is not None:
            _write(parts, directory, trainer.state.global_step)
        barrier()
    return path


def _restore(
    recorder: Recorder, checkpoint: Path | None, directory: RunDir | None, watch: CentralWatch
) -> None:
    """Go back to a checkpoint's records; without one, to the very beginning."""
    lengths: dict[str, int] = {}
    if checkpoint is not None:
        recorder.course, lengths = read_mark(checkpoint)
        step = checkpoint.name.rpartition("-")[2]
        told = (
            f"resumed at step {step}: weights, optimiser, schedule, random state, place in the data"
        )
        logger.info(told)
        watch.say(told)
    if directory is not None:
        directory.truncate(lengths)


def _write(parts: Parts, directory: RunDir, steps: int) -> None:
    """Write what was trained, and the pictures."""
    from fedllm.central.pictures import draw

    draw(directory)
    with new_folder(directory.path / parts.tuned.folder) as temporary:
        parts.tuned.save(temporary, steps)
    logger.info("wrote %s", parts.tuned.folder)


def _without_printing(trainer: object) -> None:
    """Take away the callbacks by which transformers prints."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)  # type: ignore[attr-defined]  # TRL is untyped
