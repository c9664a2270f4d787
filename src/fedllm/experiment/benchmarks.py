"""Benchmarks of a trained model: MMLU from a folder, and tasks of lm-eval."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedllm.errors import DataError, FedLLMError, MissingExtraError, ModelError, unknown
from fedllm.evaluation.choices import (
    ChoiceResult,
    answer_choices,
    model_likelihoods,
    read_subjects,
)
from fedllm.experiment.trained import Trained

Say = Callable[[str], None]


def mmlu(
    trained: Trained, folder: Path, *, shots: int = 5, say: Say = lambda text: None
) -> ChoiceResult:
    """Answer multiple-choice questions by log-likelihood.

    Args:
        trained: What is evaluated.
        folder: In the layout of MMLU; see `fedllm.evaluation.choices`.
        shots: Solved questions put before each.
        say: Told what is being done.

    Raises:
        DataError: If the folder is not laid out so.
        ModelError: If the model cannot be loaded or writes no text.
    """
    subjects = read_subjects(folder)
    loaded = _writer(trained, "--mmlu", say)
    config = loaded.model.config.get_text_config()
    total = sum(len(subject.questions) for subject in subjects)
    return answer_choices(
        subjects,
        model_likelihoods(loaded.model),
        lambda text: loaded.tokenizer(text)["input_ids"],
        shots=shots,
        longest=getattr(config, "max_position_embeddings", None),
        progress=lambda done: say(f"question {done} of {total}"),
    )


def check_harness(tasks: Sequence[str], include: Path | None) -> Any:
    """Return lm-eval's task manager, before anything is loaded.

    Raises:
        MissingExtraError: If lm-eval is not installed.
        FedLLMError: If a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval", "--lm-eval")
    if include is not None and not include.is_dir():
        raise FedLLMError(f"--include-path {include}: there is no such folder")
    from lm_eval.tasks import TaskManager

    place = None if include is None else str(include)
    manager = TaskManager(include_path=place, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # reading lm-eval's own takes it a while
        manager = TaskManager(include_path=place)
    for task in tasks:
        if task not in manager.all_tasks:
            text = unknown("lm-eval task", task, manager.all_tasks)
            raise FedLLMError(
                text.partition(" Available: ")[0]
                + " A task of your own is a YAML file in the folder of --include-path"
            )
    return manager


def harness(
    trained: Trained,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    say: Say = lambda text: None,
) -> Mapping[str, Mapping[str, Any]]:
    """Carry out tasks of lm-eval.

    Args:
        trained: What is evaluated.
        tasks: Names that lm-eval knows, or of YAML files in `include`.
        include: A folder with tasks of one's own.
        shots: Solved examples put before each; None as the task says.
        say: Told what is being done.

    Returns:
        Task to its figures, as lm-eval names them.

    Raises:
        MissingExtraError: If lm-eval is not installed.
        FedLLMError: If a task is unknown, or its data cannot be had.
    """
    manager = check_harness(tasks, include)
    loaded = _writer(trained, "--lm-eval", say)
    say(f"lm-eval: {', '.join(tasks)}")
    with _told(tasks):
        return _carried_out(loaded, tasks, manager, shots)


def _carried_out(
    loaded: Any, tasks: Sequence[str], manager: Any, shots: int | None
) -> Mapping[str, Mapping[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=8,
        softmax_dtype="float32",  # in bfloat16 near choices would be as good as each other
    )
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=shots,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    return dict(found["results"])


@contextmanager
def _told(tasks: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = " ".join(str(error).split())[:300]
        raise DataError(
            f"lm-eval cannot carry out {', '.join(tasks)}: {told}. Most tasks fetch their data from"
            " the Hugging Face hub, which needs the network; a task of your own reads local files"
        ) from error


def _writer(trained: Trained, what: str, say: Say) -> Any:
    if trained.kind != "causal-lm":
        raise ModelError(f"{what} is for models that write text, and this is a classifier")
    say("loading the model")
    return trained.whole()
