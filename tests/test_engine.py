"""The engine against plain PEFT, client by client, and against itself in other groupings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_world import (
    World,
    even_partition,
    make_world,
    peft_loss,
    peft_model,
    peft_name,
    random_adapter,
)

from fedllm.adapters import Adapter, BaseDelta, Product, algebra, is_a, is_b
from fedllm.config import TrainingConfig
from fedllm.federation import BaseClient, FitRequest, Job, View
from fedllm.seeding import rng

DECODERS = ["llama", "llama_gqa", "mistral", "qwen3", "gpt2", "gemma", "gemma2", "gemma3_text"]
ENCODERS = ["bert", "roberta", "distilbert"]
ADAM = TrainingConfig(batch_size=4, learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1)


def request(world: World, cid: int, adapter: Adapter, steps: int = 3, **rest) -> FitRequest:
    return world.engine.fit(world.job(cid, adapter, steps, **rest), adapter, BaseClient())


def peft_train(world: World, adapter: Adapter, job: Job) -> tuple[dict[str, torch.Tensor], float]:
    """Local training as a reader would write it with PEFT and torch.optim."""
    model = peft_model(world, adapter)
    parameters = dict(model.named_parameters())
    trained = {name: parameters[peft_name(name)] for name in adapter}
    training = world.plan.training
    if training.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            trained.values(), lr=job.learning_rate, weight_decay=training.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            trained.values(),
            lr=job.learning_rate,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
        )
    own, size, losses, step, epoch = (
        world.engine.partition.train(job.cid),
        world.plan.rows_per_step,
        [],
        0,
        0,
    )
    while step < job.steps:
        order = rng(job.seed, "order", "", epoch).permutation(own)
        for start in range(0, len(order), size):
            if step == job.steps:
                break
            loss = peft_loss(world, model, order[start : start + size])
            optimizer.zero_grad()
            loss.backward()
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(list(trained.values()), training.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = job.learning_rate * world.plan.step_factor(step, job.steps)
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        epoch += 1
    return {n: p.detach() for n, p in trained.items()}, float(np.mean(losses))


def assert_same_training(world: World, adapter: Adapter, atol: float = 2e-5) -> None:
    requests = [request(world, cid, adapter, steps=4 - cid % 2) for cid in range(4)]
    for want, got in zip(requests, world.engine.train(requests), strict=True):
        tensors, loss = peft_train(world, adapter, want.job)
        assert got.metrics["loss"] == pytest.approx(loss, abs=1e-4)
        for name, expected in tensors.items():
            moved = (expected - adapter[name]).abs().max()
            assert moved > 0, name
            torch.testing.assert_close(
                got.adapter[name], expected, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("family", DECODERS)
def test_a_cohort_trains_as_plain_peft_does_client_by_client(family, tiny_model):
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.05, max_grad_norm=1.0)
    world = make_world(tiny_model(family), training=training)
    assert world.resident.is_packed
    assert_same_training(world, random_adapter(world))


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_classifiers_and_their_heads_train_as_in_plain_peft(family, layout, tiny_model):
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.05, momentum=0.5)
    world = make_world(
        tiny_model(family),
        kind="sequence-classification",
        classes=3,
        training=training,
        layout=layout,
    )
    adapter = random_adapter(world)
    assert adapter.heads
    assert_same_training(world, adapter)


def test_adamw_with_decay_clipping_and_schedule_equals_torch(tiny_model):
    training = ADAM.model_copy(update={"step_schedule": "cosine", "warmup_steps": 1})
    world = make_world(tiny_model("llama_gqa"), training=training, targets="all-linear")
    assert_same_training(world, random_adapter(world), atol=2e-4)


def test_a_decoder_with_a_classification_head_trains_as_in_plain_peft(tiny_model):
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.05)
    world = make_world(
        tiny_model("llama"), kind="sequence-classification", classes=3, training=training
    )
    assert world.resident.is_packed
    assert_same_training(world, random_adapter(world))


def test_results_do_not_depend_on_who_shares_a_pass(tiny_model):
    path = tiny_model("llama_gqa")
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.05)
    reference = None
    for limit in (20, 60, 10_000):
        world = make_world(path, training=training, tokens_per_pass=limit, dropout=0.2)
        adapter = random_adapter(world)
        results = world.engine.train([request(world, cid, adapter) for cid in range(4)])
        alone = [world.engine.train([request(world, cid, adapter)])[0] for cid in range(4)]
        reference = reference or results
        for other in (results, alone):
            for want, got in zip(reference, other, strict=True):
                for name in adapter:
                    torch.testing.assert_close(
                        got.adapter[name], want.adapter[name], rtol=1e-5, atol=1e-5
                    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("client", [BaseClient(), None], ids=["both", "only-b"])
def test_one_wide_product_for_all_clients_equals_a_product_each(dropout, client, tiny_model):
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.05)
    world = make_world(tiny_model("gpt2"), training=training, dropout=dropout)
    adapters = [algebra.truncate(random_adapter(world, rank=6), r) for r in (2, 6, 4)]
    results = []
    for world.resident.is_wide in (False, True):
        fits = [
            world.engine.fit(world.job(c, a, 3), a, client or OnlyB())
            for c, a in enumerate(adapters)
        ]
        trained = world.engine.train(fits)
        views = [View(r.adapter, BaseDelta(), np.arange(5)) for r in trained]
        results.append((trained, world.engine.score(views[:1], world.engine.tokens)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        for name in one.adapter:
            torch.testing.assert_close(one.adapter[name], other.adapter[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[0][1].loss_sum, results[1][1].loss_sum, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama_gqa", "mistral", "bert"])
def test_attention_in_one_padded_batch_equals_attention_by_sequence(family, tiny_model):
    kind = "sequence-classification" if family == "bert" else "causal-lm"
    world = make_world(tiny_model(family), kind=kind, classes=3 if family == "bert" else 0)
    adapter = random_adapter(world)
    results = []
    for world.resident.forward.is_one_batch in (False, True):
        fits = [request(world, cid, adapter) for cid in (0, 2)]
        results.append([r.adapter for r in world.engine.train(fits)])
    for one, other in zip(*results, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-4)


def test_the_same_cohort_gives_the_same_bits(tiny_model):
    world = make_world(tiny_model("llama"), training=ADAM, dropout=0.1)
    adapter = random_adapter(world)
    first, second = (
        [
            r.adapter.digest()
            for r in world.engine.train([request(world, c, adapter) for c in (0, 2)])
        ]
        for _ in range(2)
    )
    assert first == second


def test_dropout_changes_training_and_follows_the_seed_of_the_job(tiny_model):
    path = tiny_model("llama")
    plain, dropped = make_world(path), make_world(path, dropout=0.3)
    adapter = random_adapter(plain)
    a = plain.engine.train([request(plain, 0, adapter)])[0].adapter
    b = dropped.engine.train([request(dropped, 0, adapter)])[0].adapter
    assert a.digest() != b.digest()


def test_unequal_ranks_train_in_one_pass_as_each_would_alone(tiny_model):
    world = make_world(tiny_model("llama"), training=ADAM)
    full = random_adapter(world, rank=8)
    adapters = [algebra.truncate(full, rank) for rank in (2, 8, 4, 1)]
    together = world.engine.train([request(world, c, a) for c, a in enumerate(adapters)])
    for cid, adapter in enumerate(adapters):
        alone = world.engine.train([request(world, cid, adapter)])[0]
        for name in adapter:
            assert together[cid].adapter[name].shape == adapter[name].shape
            torch.testing.assert_close(
                together[cid].adapter[name], alone.adapter[name], rtol=1e-5, atol=1e-5
            )


class OnlyB(BaseClient):
    def trainable(self, name, job):
        return is_b(name)


class OnlyA(BaseClient):
    def trainable(self, name, job):
        return is_a(name)


@pytest.mark.parametrize(("client", "frozen"), [(OnlyB(), is_a), (OnlyA(), is_b)])
def test_what_is_not_trainable_stays_bit_equal_even_with_weight_decay(client, frozen, tiny_model):
    world = make_world(tiny_model("llama"), training=ADAM)
    adapter = random_adapter(world)
    both = world.engine.train([request(world, 1, adapter, steps=1)])[0].adapter
    job = world.job(1, adapter, 1)
    half = world.engine.train([world.engine.fit(job, adapter, client)])[0].adapter
    for name in adapter:
        if frozen(name):
            assert torch.equal(half[name], adapter[name])
        else:
            assert not torch.equal(half[name], adapter[name])
            torch.testing.assert_close(half[name], both[name], rtol=1e-3, atol=1e-3)


def test_a_merged_base_acts_as_a_changed_weight(tiny_model):
    world = make_world(tiny_model("gpt2"))
    adapter = random_adapter(world)
    other = random_adapter(world, seed=9)
    module = adapter.modules[0]
    low = {m: other.product(m) for m in other.modules}
    base = BaseDelta().merged(1, low)
    dense = BaseDelta(dense={m: p.dense() for m, p in low.items()}, sizes=((1, 0),))
    stacked = Adapter(
        {
            **{f"{m}.lora_A": torch.cat([adapter.product(m).a, low[m].a]) for m in low},
            **{f"{m}.lora_B": torch.cat([adapter.product(m).b, low[m].b], 1) for m in low},
        },
        dict.fromkeys(low, 1.0),
    )
    rows = np.arange(8)
    want = world.engine.score([View(stacked, BaseDelta(), rows)], world.engine.tokens)
    for delta in (base, dense):
        got = world.engine.score([View(adapter, delta, rows)], world.engine.tokens)
        np.testing.assert_allclose(got.loss_sum, want.loss_sum, rtol=1e-4)
    assert module


class Pull(BaseClient):
    """Half the squared distance to zero."""

    def penalty(self, live, job):
        return 0.5 * sum((t**2).sum() for t in live.values())


class Zero(BaseClient):
    def correct(self, grads, job):
        return {name: torch.zeros_like(grad) for name, grad in grads.items()}


def test_a_penalty_adds_its_own_gradient(tiny_model):
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.1, max_grad_norm=0)
    world = make_world(tiny_model("llama"), training=training)
    adapter = random_adapter(world)
    job = world.job(0, adapter, 1)
    plain = world.engine.train([world.engine.fit(job, adapter, BaseClient())])[0].adapter
    pulled = world.engine.train([world.engine.fit(job, adapter, Pull())])[0].adapter
    for name in adapter:
        torch.testing.assert_close(plain[name] - pulled[name], 0.1 * adapter[name])


def test_a_correction_replaces_the_gradient(tiny_model):
    world = make_world(tiny_model("llama"))
    adapter = random_adapter(world)
    job = world.job(0, adapter, 2)
    got = world.engine.train([world.engine.fit(job, adapter, Zero())])[0].adapter
    for name in adapter:
        torch.testing.assert_close(got[name], adapter[name])


def test_a_client_that_diverges_says_when_and_spoils_nobody_else(tiny_model):
    training = TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=1e-2, max_grad_norm=0)
    world = make_world(tiny_model("llama"), training=training)
    good = request(world, 1, random_adapter(world), steps=3)
    bad = request(world, 2, random_adapter(world), steps=6)
    bad = replace(bad, job=replace(bad.job, learning_rate=1e38))
    (alone,) = world.engine.train([good])
    beside, diverged = world.engine.train([good, bad])
    assert diverged.metrics["diverged_at"] in range(2, 7)
    assert not all(bool(diverged.adapter[n].isfinite().all()) for n in diverged.adapter)
    assert "diverged_at" not in beside.metrics
    for name in alone.adapter:
        torch.testing.assert_close(beside.adapter[name], alone.adapter[name])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_packed_and_padded_layouts_agree(family, tiny_model):
    adapters, scores = [], []
    for layout in ("packed", "padded"):
        world = make_world(tiny_model(family), layout=layout, tokens_per_pass=64)
        start = random_adapter(world)
        adapters.append(
            [r.adapter for r in world.engine.train([request(world, c, start) for c in (0, 2)])]
        )
        views = [
            View(a, BaseDelta(), world.engine.partition.train(c))
            for a, c in zip(adapters[-1], (0, 2), strict=True)
        ]
        scores.append(world.engine.score(views, world.engine.tokens))
    for packed, padded in zip(*adapters, strict=True):
        for name in packed:
            torch.testing.assert_close(packed[name], padded[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[0].loss_sum, scores[1].loss_sum, rtol=1e-4)
    assert (scores[0].count == scores[1].count).all()
    assert scores[0].count.sum() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_batched_generation_equals_one_prompt_at_a_time(family, tiny_model):
    world = make_world(tiny_model(family), sizes=(6, 6))
    adapters = [random_adapter(world, seed=s) for s in (1, 2)]
    views = [View(a, BaseDelta(), np.arange(6) + 6 * i) for i, a in enumerate(adapters)]
    together = world.engine.generate(views, world.engine.tokens, max_new_tokens=8, batch_size=12)
    for view, adapter in zip(views, adapters, strict=True):
        model = peft_model(world, adapter)
        for row in view.rows:
            data = world.engine.tokens
            begin = data.offsets[row]
            ids = torch.tensor(
                data.tokens[begin : begin + data.prompt_lengths[row]].astype(np.int64)
            )[None]
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
            )
            text = world.resident.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert together[int(row)] == text.strip()


def test_bf16_base_trains_fp32_adapters_close_to_fp32(tiny_model):
    results = []
    for dtype in ("float32", "bfloat16"):
        world = make_world(tiny_model("llama"), dtype=dtype)
        adapter = random_adapter(world)
        results.append(world.engine.train([request(world, 0, adapter)])[0])
    assert results[1].adapter[next(iter(adapter))].dtype == torch.float32
    assert results[1].metrics["loss"] == pytest.approx(results[0].metrics["loss"], rel=0.05)


def test_a_client_with_fewer_rows_than_a_batch_trains(tiny_model):
    world = make_world(tiny_model("llama"), sizes=(1, 1))
    assert world.plan.steps(1) == 1
    got = world.engine.train([request(world, 0, random_adapter(world), steps=3)])[0]
    assert got.num_steps == 3
    assert even_partition((1, 1)).train(1).tolist() == [1]
    assert isinstance(Product(*(torch.ones(1, 1),) * 2).dense(), torch.Tensor)
    assert Path
