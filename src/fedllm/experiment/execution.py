"""Which executor runs the jobs of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.config import Config
from fedllm.federation import BaseClient, Executor, Progress

if TYPE_CHECKING:
    from fedllm.engine import CohortEngine


def executor_of(config: Config, engine: CohortEngine, client: BaseClient) -> Executor:
    """Return what `execution` asks for: this process, or several with a base of their own each."""
    from fedllm.executors import InlineExecutor, WorkerExecutor

    execution = config.execution
    if not execution.workers:
        return InlineExecutor(engine, client)
    return WorkerExecutor(Build(config), execution.workers, execution.threads_per_worker)


def close_executor(executor: Executor) -> None:
    """End the processes of an executor that has some."""
    from fedllm.executors import WorkerExecutor

    if isinstance(executor, WorkerExecutor):
        executor.close()


@dataclass(frozen=True)
class Build:
    """Makes a worker's executor from the configuration, as the main process does."""

    config: Config

    def __call__(self, progress: Progress, worker: int) -> Executor:
        """Load data and model once more; the tokenised rows come from the cache.

        Where the device is `auto` and there are several GPUs, workers take them in turn.
        """
        import torch

        from fedllm.executors import InlineExecutor
        from fedllm.experiment.parts import engine_of

        config, devices = self.config, torch.cuda.device_count()
        if config.model.device == "auto" and devices > 1:
            own = config.model.model_copy(update={"device": f"cuda:{worker % devices}"})
            config = config.model_copy(update={"model": own})
        engine, client = engine_of(config)
        return InlineExecutor(engine, client, progress)
