"""DPO and KTO on the packed engine: against plain PEFT, and against itself in other groupings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from engine_world import World, peft_model, peft_name, random_adapter
from preference_world import pair_set, plain_loss, preference_world, rated_set, rows_of

from fedllm.adapters import Adapter, BaseDelta, Product
from fedllm.config import TrainingConfig
from fedllm.engine import CohortEngine
from fedllm.engine.examples import Examples, mismatched
from fedllm.errors import ConfigError
from fedllm.federation import BaseClient, FitRequest, FitResult, View, objective_of
from fedllm.seeding import rng

Kind = Literal["dpo", "kto"]
KINDS: list[Kind] = ["dpo", "kto"]
each_kind = pytest.mark.parametrize("kind", KINDS)
Folder = Callable[[str], Path]


def request(world: World, cid: int, adapter: Adapter, steps: int = 3) -> FitRequest:
    return world.engine.fit(world.job(cid, adapter, steps), adapter, BaseClient())


def fits(world: World, adapter: Adapter, steps: int = 3) -> list[FitResult]:
    clients = range(world.engine.partition.num_clients)
    return world.engine.train([request(world, cid, adapter, steps) for cid in clients])


def same(a: FitResult, b: FitResult, tolerance: float = 2e-6) -> None:
    assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], abs=1e-5)
    for name, tensor in a.adapter.tensors.items():
        torch.testing.assert_close(tensor, b.adapter[name], rtol=0, atol=tolerance)


def peft_train(world: World, adapter: Adapter, cid: int, steps: int) -> tuple[Any, float]:
    """The same local training as a reader would write it with PEFT and torch.optim."""
    model, base, job = peft_model(world, adapter), world.fresh_model(), world.job(cid, adapter, 0)
    parameters = dict(model.named_parameters())
    trained = [parameters[peft_name(name)] for name in adapter]
    training, own = world.plan.training, world.engine.partition.train(cid)
    optimizer = torch.optim.SGD(trained, lr=training.learning_rate)
    batches: list[np.ndarray] = []
    epoch = 0
    while len(batches) < steps:
        order = rng(job.seed, "order", "", epoch).permutation(own)
        size = world.plan.rows_per_step
        batches += [order[i : i + size] for i in range(0, len(order), size)]
        epoch += 1
    losses = []
    for rows in batches[:steps]:
        optimizer.zero_grad()
        loss = plain_loss(model, base, world.engine.tokens, rows.tolist(), training.beta)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, float(np.mean(losses))


@each_kind
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_local_training_equals_plain_peft(tiny_model: Folder, kind: Kind, family: str) -> None:
    sgd = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.1, max_grad_norm=0.0)
    world = preference_world(tiny_model(family), kind, training=sgd)
    adapter = random_adapter(world)
    for cid, result in enumerate(fits(world, adapter)):
        model, loss = peft_train(world, adapter, cid, 3)
        assert result.metrics["loss"] == pytest.approx(loss, abs=1e-5)
        parameters = dict(model.named_parameters())
        for name, tensor in result.adapter.tensors.items():
            torch.testing.assert_close(tensor, parameters[peft_name(name)], rtol=0, atol=1e-5)


@each_kind
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_results_do_not_depend_on_how_steps_are_cut_into_passes(
    tiny_model: Folder, kind: Kind, layout: str
) -> None:
    folder = tiny_model("llama")
    sgd = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.1, max_grad_norm=0.5)
    whole = preference_world(folder, kind, training=sgd, dropout=0.2)
    adapter = random_adapter(whole)
    cut = preference_world(
        folder, kind, training=sgd, dropout=0.2, tokens_per_pass=20, layout=layout
    )
    for a, b in zip(fits(whole, adapter), fits(cut, adapter), strict=True):
        same(a, b)


@each_kind
def test_accumulating_is_the_same_as_a_larger_batch(tiny_model: Folder, kind: Kind) -> None:
    base = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.1)
    split = base.model_copy(update={"batch_size": 2, "gradient_accumulation": 2})
    worlds = [preference_world(tiny_model("llama"), kind, training=t) for t in (base, split)]
    adapter = random_adapter(worlds[0])
    for a, b in zip(*(fits(world, adapter) for world in worlds), strict=True):
        same(a, b)


@each_kind
def test_a_client_alone_gets_what_it_gets_in_company(tiny_model: Folder, kind: Kind) -> None:
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.1)
    world = preference_world(tiny_model("llama"), kind, training=training, dropout=0.1)
    adapter = random_adapter(world)
    together = fits(world, adapter)
    for cid, result in enumerate(together):
        same(result, world.engine.train([request(world, cid, adapter)])[0])


@each_kind
def test_the_gradient_is_that_of_the_mean_over_the_shard(tiny_model: Folder, kind: Kind) -> None:
    world = preference_world(tiny_model("llama"), kind)
    adapter, cid = random_adapter(world), 1
    asked = replace(request(world, cid, adapter), is_gradient=True)
    found = world.engine.train([asked])[0]
    model = peft_model(world, adapter)
    rows = world.engine.partition.train(cid).tolist()
    plain_loss(model, world.fresh_model(), world.engine.tokens, rows, 0.1).backward()
    parameters = dict(model.named_parameters())
    for name, tensor in found.adapter.tensors.items():
        torch.testing.assert_close(tensor, parameters[peft_name(name)].grad, rtol=0, atol=1e-5)


def test_training_prefers_the_better_answers(tiny_model: Folder) -> None:
    world = preference_world(tiny_model("llama"), "dpo", sizes=(6,))
    adapter = world.resident.initial_adapter(4, 2.0, 0)
    rows = np.arange(6)

    def margins(adapter: Adapter) -> np.ndarray:
        found = world.engine.score([View(adapter, BaseDelta(), rows)], world.engine.tokens)
        assert found.preferences is not None
        return found.preferences.margins

    assert np.abs(margins(adapter)).max() < 1e-5  # B = 0: the model is the base
    trained = fits(world, adapter, steps=20)[0]
    assert (margins(trained.adapter) > 0.5).all()
    assert trained.metrics["loss"] < 0.5


def merged(world: World) -> BaseDelta:
    """What an algorithm that merges into the base has merged, of one layer."""
    layer = next(iter(world.resident.shapes))
    rows, columns = world.resident.shapes[layer]
    stream = torch.Generator().manual_seed(5)
    b, a = (torch.randn(s, generator=stream) * 0.3 for s in ((rows, 2), (2, columns)))
    return BaseDelta().merged(1, {layer: Product(b, a)})


@each_kind
def test_the_reference_stays_the_original_base_when_something_is_merged_into_it(
    tiny_model: Folder, kind: Kind
) -> None:
    plain, moved = (preference_world(tiny_model("llama"), kind) for _ in range(2))
    adapter, delta = plain.resident.initial_adapter(4, 2.0, 0), merged(moved)
    rows = np.arange(len(moved.engine.tokens))
    before = plain.engine.score([View(adapter, BaseDelta(), rows)], plain.engine.tokens)
    # asked for the first time while the base has moved
    after = moved.engine.score([View(adapter, delta, rows)], moved.engine.tokens)
    assert before.preferences is not None
    assert after.preferences is not None
    ratios = (after.preferences.logps - before.preferences.logps)[rows]
    rewards = 0.1 * ratios
    if kind == "dpo":
        wanted = rewards[:, 0] - rewards[:, 1]
    else:
        flags = moved.engine.tokens.desirable
        wanted = np.where(flags, rewards[:, 0], -rewards[:, 0])
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(after.preferences.margins, wanted, atol=1e-5)


@each_kind
def test_what_the_base_says_is_computed_once(
    tiny_model: Folder, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = preference_world(tiny_model("llama"), kind)
    adapter = random_adapter(world)
    fits(world, adapter, steps=1)
    references = world.engine._references
    rows = np.arange(len(world.engine.tokens))
    before = references.of(rows).copy()
    monkeypatch.setattr(
        "fedllm.engine.references.in_passes", lambda *_: pytest.fail("computed again")
    )
    references.learn(rows)
    np.testing.assert_array_equal(references.of(rows), before)


@each_kind
def test_scores_equal_plain_peft(tiny_model: Folder, kind: Kind) -> None:
    world = preference_world(tiny_model("llama"), kind)
    adapter, rows = random_adapter(world), np.arange(len(world.engine.tokens))
    found = world.engine.score([View(adapter, BaseDelta(), rows)], world.engine.tokens)
    model, base = peft_model(world, adapter), world.fresh_model()
    wanted = plain_loss(model, base, world.engine.tokens, rows.tolist(), 0.1)
    assert found.preferences is not None
    assert found.preferences.losses.mean() == pytest.approx(wanted.item(), abs=1e-5)
    own = found.loss_sum / found.count
    np.testing.assert_allclose(found.preferences.logps[:, 0], -own * found.count, rtol=1e-6)


def test_a_mismatched_answer_is_that_of_the_row_before_of_the_same_client() -> None:
    rows = rows_of(
        [([1, 2], [3]), ([4], [5, 6]), ([7], [8]), ([9, 10], [11, 12])], [True, False, True, False]
    )
    found = mismatched(rows, np.array([2, 0, 1, 3]), np.array([0, 0, 0, 1]))
    texts = [found.row(i)[0].tolist() for i in range(4)]
    # client 0 in the order 2, 0, 1; client 1 has one row, whose answer stays its own
    assert texts == [[7, 5, 6], [1, 2, 8], [4, 3], [9, 10, 11, 12]]
    assert [found.row(i)[1].tolist() for i in range(4)][1] == [False, False, True]


def test_no_mismatched_sequence_is_longer_than_the_longest_row() -> None:
    rows = rows_of([([1, 2, 3, 4, 5], [6]), ([7], [8, 9, 10, 11, 12])], [True, False])
    found = mismatched(rows, np.array([0, 1]), np.array([0, 0]))
    assert found.row(0)[0].tolist() == [1, 2, 3, 4, 5, 8]
    assert found.row(1)[0].tolist() == [7, 6]


def test_only_last_answers_count() -> None:
    turns = rows_of([([1, 2, 3], [4])])
    flags = np.array([False, True, True, True])  # an earlier answer is supervised as well
    pair = replace(turns, supervised=flags, rejected=replace(turns, supervised=flags))
    found = Examples.of(pair, "dpo")
    assert found.tokens.supervised.tolist() == [False, False, False, True] * 2
    assert Examples.of(pair, "sft").tokens.supervised.tolist() == flags.tolist()


def test_sft_on_pairs_learns_the_better_answers_alone(tiny_model: Folder) -> None:
    sft = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.1, objective="sft")
    world = preference_world(tiny_model("llama"), "dpo", training=sft)
    adapter = random_adapter(world)
    pairs = fits(world, adapter)
    chosen = replace(world.engine.tokens, rejected=None)
    world.engine = CohortEngine(world.resident, chosen, world.engine.partition, world.plan)
    for a, b in zip(pairs, fits(world, adapter), strict=True):
        same(a, b, 0.0)


@pytest.mark.parametrize(
    ("objective", "task", "said"),
    [
        ("sft", "rated", "unwanted answers"),
        ("dpo", "rated", "task 'preference'"),
        ("kto", "preference", "task 'rated'"),
        ("dpo", "chat", "task 'preference'"),
    ],
)
def test_objectives_that_do_not_fit_the_data_are_refused(
    objective: str, task: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        objective_of(TrainingConfig(objective=objective), task)


def test_kto_with_one_row_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        objective_of(TrainingConfig(batch_size=1), "rated")
    with pytest.raises(ValueError, match="at least 2"):
        TrainingConfig(batch_size=1, objective="kto")


def test_label_smoothing_needs_the_loss_it_belongs_to() -> None:
    with pytest.raises(ValueError, match="loss_type: robust"):
        TrainingConfig(label_smoothing=0.1)


def test_a_client_with_one_rated_row_trains(tiny_model: Folder) -> None:
    world = preference_world(tiny_model("llama"), "kto", sizes=(1, 4))
    for result in fits(world, random_adapter(world)):
        assert np.isfinite(result.metrics["loss"])


def test_both_sides_of_pairs_count_as_work(tiny_model: Folder) -> None:
    world = preference_world(tiny_model("llama"), "dpo", sizes=(4,))
    data = world.engine.tokens
    assert data.rejected is not None
    (result,) = fits(world, random_adapter(world), steps=1)
    assert result.metrics["tokens"] == len(data.tokens) + len(data.rejected.tokens)
    assert world.engine.lengths.sum() == result.metrics["tokens"]


@each_kind
def test_reference_figures_do_not_depend_on_who_asks_first(tiny_model: Folder, kind: Kind) -> None:
    """A resumed run asks in another order; its numbers must be the same to the last bit."""
    make = pair_set if kind == "dpo" else rated_set
    worlds = [preference_world(tiny_model("llama"), kind) for _ in range(2)]
    test = make(150, 200, 7)
    adapter = random_adapter(worlds[0])
    few, every = np.arange(3, 40, 4), np.arange(150)
    for world, asked in zip(worlds, ([few, every], [every]), strict=True):
        for rows in asked:
            world.engine.score([View(adapter, BaseDelta(), rows)], test)
    found = [world.engine._test_references(test).of(every) for world in worlds]
    np.testing.assert_array_equal(*found)


def test_reports_know_which_metrics_are_better_when_they_fall() -> None:
    from fedllm.evaluation import METRICS
    from fedllm.results import history

    assert {n for n, m in METRICS.items() if not m.is_higher_better} == set(history._FALLING)
