"""DPO and KTO against TRL: its own loss code on fixed numbers, and its trainers on a tiny model."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from engine_world import World, even_partition, make_world, peft_name, random_adapter
from preference_world import rows_of

from fedllm.adapters import Adapter, is_a, is_b
from fedllm.config import ModelConfig, TrainingConfig
from fedllm.engine import CohortEngine
from fedllm.engine.objectives_preference import pair_losses, rated_losses
from fedllm.federation import BaseClient
from fedllm.models import load_tokenizer
from fedllm.seeding import rng

pytestmark = pytest.mark.slow
WORDS = (
    "river",
    "ran",
    "over",
    "warm",
    "stones",
    "while",
    "small",
    "birds",
    "sang",
    "rain",
    "bread",
)
KTO_SEED = 6
"""Of an adapter under which mismatched answers are likelier than under the base."""
TINY = Path(__file__).parents[1] / "src/fedllm/models/builtin/tiny"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """TRL, its import of compiled helpers and the trainer it stands on warn of their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fixed_trainer(**fields: Any) -> SimpleNamespace:
    """What TRL's loss code reads of a trainer."""
    same = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return SimpleNamespace(
        accelerator=same,
        model=torch.nn.Identity(),
        ref_model=None,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def outputs(logps: torch.Tensor) -> SimpleNamespace:
    """What TRL's fused head returns, as far as the loss goes."""
    return SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
    )


def fixed_batch(seed: int, rows: int = 6, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (rows, length) of tokens, and which of them (rows, length + 1) count."""
    stream = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, length, (rows,), generator=stream)
    mask = torch.arange(length + 1)[None] >= (length + 1 - counts)[:, None]
    logps = -3 * torch.rand(rows, length, generator=stream) * mask[:, 1:]
    return logps, mask.long()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_pair_losses_and_slopes_equal_trls(loss_type: Any, beta: float, seed: int) -> None:
    from trl import DPOTrainer

    smoothing = 0.2 if loss_type == "robust" else 0.0
    logps, mask = fixed_batch(seed)
    base = logps.sum(1) + torch.randn(6, generator=torch.Generator().manual_seed(seed))
    theirs = logps.clone().requires_grad_()
    trainer = fixed_trainer(
        beta=beta,
        label_smoothing=smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": base[:3],
        "ref_rejected_logps": base[3:],
    }
    wanted = DPOTrainer._compute_loss(trainer, lambda **_: outputs(theirs), inputs, False)
    wanted.backward()

    ours = logps.clone().requires_grad_()
    training = TrainingConfig(beta=beta, loss_type=loss_type, label_smoothing=smoothing)
    ratios = (ours.sum(1) - base).view(2, 3).T
    found = pair_losses(ratios, mask.sum(1).view(2, 3).T, training).mean()
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flags", ["mixed", "wanted", "unwanted"])
@pytest.mark.parametrize("seed", range(4))
def test_rated_losses_and_slopes_equal_trls(seed: int, flags: str) -> None:
    from trl import KTOTrainer

    logps, mask = fixed_batch(seed)
    crossed, crossed_mask = fixed_batch(100 + seed)
    stream = torch.Generator().manual_seed(seed)
    base = logps.sum(1) + torch.randn(6, generator=stream)
    crossed_base = crossed.sum(1) + torch.randn(6, generator=stream)  # of either sign in the mean
    desirable = {"mixed": [1, 0, 0, 1, 1, 0], "wanted": [1] * 6, "unwanted": [0] * 6}[flags]
    labels = torch.tensor(desirable, dtype=torch.bool)
    theirs = logps.clone().requires_grad_()
    trainer = fixed_trainer(
        beta=0.3,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(
        trainer, model, batch
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.ones_like(crossed_mask),
        "KL_attention_mask": torch.ones_like(crossed_mask),
        "KL_completion_mask": crossed_mask,
        "label": labels,
        "ref_logps": base,
        "ref_KL_logps": crossed_base,
    }

    def model(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return outputs(crossed if int(input_ids[0, 0]) else theirs)

    wanted = KTOTrainer._compute_loss(trainer, model, inputs, False)
    wanted.backward()

    ours = logps.clone().requires_grad_()
    training = TrainingConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    drift = (crossed.sum(1) - crossed_base).mean().clamp(min=0).expand(6)
    found = rated_losses(ours.sum(1) - base, drift, labels, training).mean()
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


def sentences(count: int, seed: int) -> list[str]:
    stream = np.random.default_rng(seed)
    return [" ".join(stream.choice(WORDS, stream.integers(3, 9))) for _ in range(count)]


def tiny_world(training: TrainingConfig) -> World:
    return make_world(TINY, sizes=(6,), training=training)


def trl_train(
    make: Callable[..., Any], world: World, adapter: Adapter, folder: Path, **settings: Any
) -> tuple[Any, dict[str, torch.Tensor], float]:
    """Train the same adapter with a trainer of TRL: one batch a step, plain SGD."""
    module = adapter.modules[0]
    rank = adapter.rank_of(module)
    config = peft.LoraConfig(
        r=rank, lora_alpha=adapter.scaling[module] * rank, target_modules=list(adapter.modules)
    )
    trainer = make(
        world.fresh_model(),
        config,
        output_dir=str(folder),
        per_device_train_batch_size=6,
        learning_rate=world.plan.training.learning_rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        beta=world.plan.training.beta,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    parameters = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name in adapter:
            parameters[peft_name(name)].copy_(adapter[name])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    trained = {name: parameters[peft_name(name)].detach() for name in adapter}
    return trainer, trained, float(np.mean(losses))


def assert_alike(
    world: World, adapter: Adapter, steps: int, wanted: dict[str, torch.Tensor], loss: float
) -> None:
    request = world.engine.fit(world.job(0, adapter, steps), adapter, BaseClient())
    (found,) = world.engine.train([request])
    assert found.metrics["loss"] == pytest.approx(loss, abs=1e-4)  # TRL's log is rounded
    for name, tensor in found.adapter.tensors.items():
        assert is_a(name) or is_b(name)
        assert float((wanted[name] - adapter[name]).abs().max()) > 1e-4  # it moved
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_three_steps_of_dpo_equal_trls(tmp_path: Path, loss_type: Any) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    texts = [sentences(6, seed) for seed in range(3)]
    data = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    training = TrainingConfig(
        batch_size=6, optimizer="sgd", learning_rate=0.05, max_grad_norm=0.0, loss_type=loss_type
    )
    world = tiny_world(training)
    adapter = random_adapter(world)

    def make(model: Any, config: Any, **settings: Any) -> Any:
        return DPOTrainer(
            model=model,
            args=DPOConfig(**settings),
            train_dataset=data,
            processing_class=load_tokenizer(ModelConfig(path=str(TINY))),
            peft_config=config,
        )

    trainer, wanted, loss = trl_train(
        make, world, adapter, tmp_path, max_steps=3, loss_type=loss_type
    )
    rows = list(trainer.train_dataset)
    chosen = rows_of([(row["prompt_ids"], row["chosen_ids"]) for row in rows])
    rejected = rows_of([(row["prompt_ids"], row["rejected_ids"]) for row in rows])
    pairs = replace(chosen, rejected=rejected)
    world.engine = CohortEngine(world.resident, pairs, even_partition([6]), world.plan)
    assert_alike(world, adapter, 3, wanted, loss)


def test_a_step_of_kto_equals_trls(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    prompts, answers = sentences(6, 5), sentences(6, 6)
    flags = [True, False, False, True, True, False]
    data = Dataset.from_dict({"prompt": prompts, "completion": answers, "label": flags})
    training = TrainingConfig(
        batch_size=6,
        optimizer="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        desirable_weight=1.2,
        undesirable_weight=0.8,
    )
    world = tiny_world(training)
    adapter = random_adapter(world, seed=KTO_SEED)

    def make(model: Any, config: Any, **settings: Any) -> Any:
        return KTOTrainer(
            model=model,
            args=KTOConfig(desirable_weight=1.2, undesirable_weight=0.8, **settings),
            train_dataset=data,
            processing_class=load_tokenizer(ModelConfig(path=str(TINY))),
            peft_config=config,
        )

    trainer, wanted, loss = trl_train(make, world, adapter, tmp_path, max_steps=1)
    assert trainer.state.log_history[0]["kl"] > 1e-3  # else that term would be untested
    order = rng(world.job(0, adapter, 1).seed, "order", "", 0).permutation(6)
    rows: list[Any] = [None] * 6
    for row, place in zip(trainer.train_dataset, order, strict=True):
        rows[place] = row  # TRL pairs answers in the order of the file, we in that of the batch
    sides = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
    rated = rows_of(sides, [bool(row["label"]) for row in rows])
    rated = room_for_any_answer(rated)
    world.engine = CohortEngine(world.resident, rated, even_partition([6]), world.plan)
    assert_alike(world, adapter, 1, wanted, loss)


def room_for_any_answer(rated: Any) -> Any:
    """One more row, that nobody owns and that is long: mismatched sequences stay whole."""
    filler = rows_of([(list(range(100, 180)), list(range(100, 180)))], [True])
    return replace(
        rated,
        tokens=np.concatenate([rated.tokens, filler.tokens]),
        supervised=np.concatenate([rated.supervised, filler.supervised]),
        offsets=np.concatenate([rated.offsets, [rated.offsets[-1] + 160]]),
        prompt_lengths=np.concatenate([rated.prompt_lengths, filler.prompt_lengths]),
        desirable=np.concatenate([rated.desirable, filler.desirable]),
        references=(*rated.references, ""),
    )
