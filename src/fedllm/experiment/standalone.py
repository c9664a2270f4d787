"""Evaluation of what is no federated run: a central run, an adapter, a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from fedllm.adapters.reading import is_native
from fedllm.config import DataConfig, EvaluationConfig, TrainingConfig
from fedllm.data import Dataset, Partition, load_dataset
from fedllm.errors import DataError, FedLLMError, ModelError, RunError
from fedllm.evaluation import BY_TASK, METRICS, Evaluator
from fedllm.experiment.evaluate import Evaluated
from fedllm.experiment.parts import check_length
from fedllm.experiment.trained import Trained
from fedllm.federation import MemoryStore, Payload, Plan

if TYPE_CHECKING:
    from fedllm.adapters import Adapter
    from fedllm.engine import CohortEngine
    from fedllm.models import LoadedModel

_MOST_POSITIONS = 4096


def evaluate_alone(
    trained: Trained,
    data: str | None,
    *,
    metrics: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
) -> Evaluated:
    """Evaluate on the test rows of a central run, or on all rows of a file.

    Args:
        trained: What is evaluated.
        data: A file (all rows), or what `data.path` may be (its test split); None: the run's own.
        metrics: Which metrics; None: those of the central run, or those that fit the rows.
        say: Told what is being done.
        progress: Called with the number of answers generated so far.

    Raises:
        FedLLMError: If no data is given, or something does not fit.
    """
    _check(trained)
    config = _data(trained, data)
    say("loading the model")
    loaded = trained.whole() if trained.kind == "causal-lm" else None
    tokenizer: Any = _tokenizer(trained) if loaded is None else loaded.tokenizer
    seed, template = trained.artifact.config.get("seed", 0), trained.artifact.model.chat_template
    dataset = load_dataset(config, tokenizer, kind=trained.kind, seed=seed, template=template)
    if loaded is None:
        _check_labels(trained, dataset)
        loaded = replace(trained, label_names=dataset.label_names).whole()
    measured = _measured(trained, data, metrics, dataset.task)
    evaluator, start = _evaluator(loaded, dataset, measured)
    say("evaluating")
    views = _Fixed(start)
    found = evaluator.evaluate(views, MemoryStore(), ("global",), sample=False, progress=progress)
    record = {name: part for name, part in found.record.items() if name != "clients"}
    return Evaluated(None, len(dataset.test), evaluator.names, replace(found, record=record))


def _check(trained: Trained) -> None:
    """Refuse what cannot be evaluated on rows."""
    if trained.adapter is not None and is_native(trained.adapter):
        raise ModelError(
            f"{trained.artifact.path} is an adapter in fedllm's own layout; evaluate the run that"
            " it comes from"
        )
    if trained.artifact.config.get("stage") == "rm":
        raise FedLLMError(
            f"{trained.artifact.path} is a reward model: it compares answers and gives none. How"
            f" well it does so on its test pairs: fedllm show {trained.artifact.path}"
        )


def _measured(
    trained: Trained, data: str | None, names: Sequence[str] | None, task: str
) -> EvaluationConfig:
    """Return what is measured: on its own rows, as a central run was told to."""
    own = trained.artifact.config.get("evaluation") or {}
    kept = {key: own[key] for key in ("max_new_tokens", "batch_size") if key in own}
    chosen = names or (own.get("metrics", "auto") if data is None else "auto")
    of_base = [name for name, metric in METRICS.items() if metric.needs == "preferences"]
    if asked := sorted({*(names or ())} & {*of_base}):
        raise FedLLMError(
            f"--metrics {asked[0]} compares a model with the base it comes from, and here is one"
            " model alone. A run has that figure: fedllm show RUN"
        )
    every = BY_TASK[task] if chosen == "auto" else chosen
    fit = [name for name in every if name not in of_base]
    return EvaluationConfig.model_validate({**kept, "metrics": fit or ["loss"]})


@dataclass(frozen=True)
class _Fixed:
    """Hands out one model, whoever asks."""

    adapter: Adapter

    def view(self, cid: int | None = None, state: Any = None) -> Payload:
        """Return the model."""
        return Payload(0, self.adapter)


def _data(trained: Trained, path: str | None) -> DataConfig:
    run = trained.artifact.config
    if path is None:
        if trained.artifact.kind != "central":
            raise FedLLMError(
                f"{trained.artifact.path} is no run, so it has no test rows of its own; give some"
                " with --data PATH"
            )
        try:
            return DataConfig.model_validate(run.get("data") or {})
        except ValidationError as error:
            raise RunError(f"config.yaml: data: {error.errors()[0]['msg']}") from None
    own: Mapping[str, Any] = {"test_path": path} if Path(path).expanduser().is_file() else {}
    return DataConfig(path=path, max_length=_positions(trained), **own)


def _positions(trained: Trained) -> int:
    """Return how long rows may be: as the model knows positions, within reason."""
    from fedllm.models.architecture import read_architecture
    from fedllm.models.sources import locate

    config = trained.artifact.model
    folder = locate(config, weights=False)
    found = read_architecture(folder, config, trained.kind).get_text_config()
    return int(min(getattr(found, "max_position_embeddings", _MOST_POSITIONS), _MOST_POSITIONS))


def _tokenizer(trained: Trained) -> Any:
    from fedllm.models import load_tokenizer
    from fedllm.models.tokenizer import tokenizer_in

    own, model = trained.artifact.tokenizer, trained.artifact.model
    return load_tokenizer(model) if own is None else tokenizer_in(own, model)


def _check_labels(trained: Trained, dataset: Dataset) -> None:
    """Refuse a classifier whose own classes are in another order than the data's."""
    from fedllm.models.architecture import read_architecture
    from fedllm.models.sources import locate

    config = trained.artifact.model
    found = read_architecture(locate(config, weights=False), config, "sequence-classification")
    own = [str(name) for _, name in sorted((found.id2label or {}).items())]
    names = list(dataset.label_names)
    if trained.adapter is None and set(own) == set(names) and own != names:
        raise DataError(
            f"the model's classes are {own}, and those of the data {names}: their order differs, so"
            " figures would be wrong. Give data whose labels are numbered as the model's"
        )


def _evaluator(
    loaded: LoadedModel, dataset: Dataset, metrics: EvaluationConfig
) -> tuple[Evaluator, Adapter]:
    """Return an evaluator over all test rows, and an adapter that changes nothing."""
    from fedllm.engine import CohortEngine, Resident
    from fedllm.models import position_limit

    check_length(position_limit(loaded.model), loaded.source, dataset)
    resident = Resident(loaded, stop_ids=dataset.stop_ids)
    whole = _everything(dataset)
    engine: CohortEngine = CohortEngine(resident, dataset.train, whole, Plan(TrainingConfig(), 1))
    evaluator = Evaluator(
        scorer=engine,
        tokens=dataset.test,
        partition=whole,
        task=dataset.task,
        kind=loaded.kind,
        label_names=dataset.label_names,
        config=metrics,
        seed=0,
        prompts=[row.subject for row in dataset.rows.test],
    )
    return evaluator, resident.initial_adapter(1, 1.0, 0)


def _everything(dataset: Dataset) -> Partition:
    """Return one client that owns all rows."""
    train, test = (np.arange(len(s), dtype=np.int32) for s in (dataset.train, dataset.test))
    return Partition(train, np.array([0, len(train)]), test, np.array([0, len(test)]))
