"""TRL's trainers, fed with our token rows and watched step by step."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedllm.central.answer_loss import AnswerLoss, fits
from fedllm.central.arguments import arguments
from fedllm.central.packed import FlatCollator, PackCollator
from fedllm.central.rewards import reward_function
from fedllm.central.stages import STAGES
from fedllm.central.tuning import Tuned
from fedllm.config import CentralConfig
from fedllm.errors import FedLLMError, TrainingError
from fedllm.starting import import_trl

if TYPE_CHECKING:
    from fedllm.central.tables import Settled
    from fedllm.engine.forward import Forward

Where = Callable[[Sequence[int]], str]
"""From numbers of training rows to where they stand, for messages."""


def make_trainer(
    config: CentralConfig,
    tuned: Tuned,
    train: Settled,
    test: Settled | None,
    folder: Path,
    where: Where,
    flat: Forward | None = None,
) -> Any:
    """Return the trainer of a stage.

    Args:
        config: The checked configuration.
        tuned: The model and what of it is trained.
        train: Examples to learn from (see `fedllm.central.examples`).
        test: Examples that answers are compared on; None where TRL does not evaluate.
        folder: Where checkpoints go.
        where: Names rows in messages.
        flat: What keeps the examples of a batch apart in one row (see `packed.layout`).

    Raises:
        FedLLMError: If this version of TRL lacks the trainer.
    """
    base, settings = _classes(config.stage)
    more = _more(config, tuned)
    if test is not None:
        more["eval_dataset"] = test
    with quiet_trainer():
        trainer = _watched(base, *((AnswerLoss,) if fits(config.stage, tuned.body) else ()))(
            model=tuned.model,
            args=_on_one_device(settings(**arguments(config, tuned, folder))),
            train_dataset=train,
            **more,
        )
    trainer.where = where
    trainer.token_prompts = train["prompt_ids"] if config.stage == "grpo" else []
    _without_copies(trainer, tuned)
    _finish(config, trainer, flat)
    return trainer


def _on_one_device(settings: Any) -> Any:
    """Keep transformers from splitting batches among all GPUs that one process sees.

    Rows, and logits that are asked for by place, cannot be split so; `training.processes` can.
    """
    if settings.n_gpu > 1:
        settings._n_gpu = 1
    return settings


def _more(config: CentralConfig, tuned: Tuned) -> dict[str, Any]:
    """Return what some stages need besides model and rows."""
    more: dict[str, Any] = {"processing_class": tuned.loaded.tokenizer}
    if STAGES[config.stage].needs_reference:
        # with adapters, the model without them is the reference
        is_lora = config.adapter.method == "lora"
        more["ref_model"] = None if is_lora else _frozen_copy(tuned.model)
    if config.stage == "grpo":
        more["reward_funcs"] = [reward_function(name) for name in config.objective.rewards]
    return more


def _finish(config: CentralConfig, trainer: Any, flat: Forward | None) -> None:
    """Set what a trainer takes only after it is made."""
    if config.adapter.loraplus_ratio is not None:
        trainer.optimizer = _loraplus(trainer, config.adapter.loraplus_ratio)
    if flat is not None:
        trainer.flat, trainer.data_collator = flat, FlatCollator()
    elif config.is_packed:
        trainer.data_collator = PackCollator(trainer.processing_class.pad_token_id)
    if config.stage != "grpo":
        trainer.data_collator = _Collator(trainer.data_collator, mismatches=config.stage == "kto")
    if config.stage == "kto" and config.training.shuffle:
        # TRL mismatches answers before they are shuffled, our collator afterwards
        trainer.args.train_sampling_strategy = "random"


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Hold back what TRL and transformers say of settings that we chose on purpose."""
    from fedllm.models.quiet import quiet

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _classes(stage: str) -> tuple[type, type]:
    """Import the one trainer that is used, and its settings.

    Raises:
        FedLLMError: If this version of TRL lacks it.
    """
    kind = STAGES[stage]
    found = []
    try:
        # what lies in its experimental namespace warns that it does, on import
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_trl()
            for part, name in (("trainer", "Trainer"), ("config", "Config")):
                module = importlib.import_module(f"{kind.module}_{part}")
                found.append(getattr(module, kind.trainer + name))
    except (ImportError, AttributeError) as error:
        import trl

        raise FedLLMError(
            f"stage {stage} needs {kind.module}_trainer of TRL, which version {trl.__version__}"
            f" lacks ({error}). Install trl 1.0 or later; tested with 1.16"
        ) from None
    return found[0], found[1]


class _Collator:
    """Keeps the numbers of the rows beside what the trainer's own collator makes of them."""

    def __init__(self, own: Callable[[Any], dict[str, Any]], *, mismatches: bool) -> None:
        self.own, self.mismatches = own, mismatches

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch, with `rows`: a list of numbers."""
        rows = [row for one in features for row in one["rows"]]
        rest = [{k: v for k, v in one.items() if k != "rows"} for one in features]
        if self.mismatches:
            # KTO estimates a divergence from answers to other prompts of the batch
            answers = [one["completion_ids"] for one in rest]
            for one, other in zip(rest, [answers[-1], *answers[:-1]], strict=True):
                one["KL_completion_ids"] = other
        return {**self.own(rest), "rows": rows}


class _Watching:
    """Stops at a loss that is not finite, counts tokens, and takes rows as they are."""

    where: Where
    token_prompts: Sequence[Sequence[int]]
    _rows: Sequence[int] = ()
    loss_sum: float | torch.Tensor = 0.0
    """Of the steps since `take`, a tensor once there was one."""
    seen: list[int]
    """Rows since `take`."""

    def peek(self) -> tuple[float, list[int]]:
        """Return the sum of step losses and the rows since `take`."""
        return float(self.loss_sum), list(getattr(self, "seen", []))

    def take(self) -> tuple[float, list[int]]:
        """Return the sum of step losses and the rows since the last call, and begin anew."""
        found = self.peek()
        self.loss_sum, self.seen = 0.0, []
        return found

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Take rows as they are: they are tokenised, and masked, already."""
        return dataset

    def _send_telemetry(self) -> None:
        """Tell nobody."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card into checkpoints."""

    def _set_signature_columns_if_needed(self) -> None:
        """Keep all columns."""

    def _tokenize_prompts(
        self, prompts: Sequence[str]
    ) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return the ids of prompts that are given by their number (GRPO)."""
        return [list(self.token_prompts[int(number)]) for number in prompts], None, {}

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            self._rows = inputs.pop("rows", ())
        else:
            self._rows = [row for one in inputs for row in one.get("rows", ())]
        return super()._prepare_inputs(inputs)  # type: ignore[misc]  # a mixin

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch.

        Raises:
            TrainingError: If its loss is not finite.
        """
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]  # a mixin
        if not math.isfinite(loss.item()):
            step = self.state.global_step + 1  # type: ignore[attr-defined]  # the trainer's
            raise TrainingError(
                f"the loss is {loss.item()} in step {step}, on the rows {self.where(self._rows)}."
                " Lower training.learning_rate, check these rows, or hold the model in float32"
            )
        self.loss_sum = self.loss_sum + loss.detach()
        self.seen = [*getattr(self, "seen", []), *self._rows]
        return loss


def _watched(base: type, *more: type) -> type:
    """Return TRL's trainer with our watch over it, and what else is laid over it."""
    return type(f"Watched{base.__name__}", (_Watching, *more, base), {})


def _frozen_copy(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.requires_grad_(False)
    return other.train(False)


def _without_copies(trainer: Any, tuned: Tuned) -> None:
    """Take back what TRL does to adapters that it believes were trained before.

    It keeps a second one for reference, where the base without adapters is the same, and rounds
    those on a quantised base to bfloat16.
    """
    names = getattr(tuned.model, "peft_config", {})
    if "ref" in names:
        tuned.model.delete_adapter("ref")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _loraplus(trainer: Any, ratio: float) -> torch.optim.Optimizer:
    """Return an optimiser whose learning rate for B is `ratio` times that of A."""
    from peft.optimizers import create_loraplus_optimizer

    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model=trainer.model,
        optimizer_cls=kind,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=trainer.args.weight_decay,
        **settings,
    )
    return optimizer
