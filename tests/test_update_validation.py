"""Every honest update passes; every fault is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.factors import HEAD, adapter, quick, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.adapters import Adapter, Routing, algebra, name_a, name_b, name_core
from fedllm.federation import Job, Payload, Update
from fedllm.federation.validation import reject_reason

A, B = name_a("q"), name_b("q")
ROWS, STEPS, BOUND = 12, 5, 3.0


def download(seed: int = 0, rank: int = 4, dtype: torch.dtype = torch.float32) -> Adapter:
    return adapter(seed, rank, dtype=dtype)


def job_of(start: Adapter) -> Job:
    return Job(cid=3, payload=Payload(version=7, adapter=start), steps=STEPS, num_samples=ROWS)


def update_of(job: Job, tensors: Mapping[str, Tensor] | None = None) -> Update:
    """Return what an honest client sends, with some tensors replaced."""
    return Update(
        cid=job.cid,
        version=job.version,
        adapter=job.payload.adapter.overlaid(tensors or {}),
        num_samples=job.num_samples,
        num_steps=job.steps,
        metrics={"loss": 1.5},
    )


def shifted(start: Adapter, size: float) -> dict[str, Tensor]:
    """Return all tensors moved, so that the whole change has this norm."""
    count = sum(tensor.numel() for tensor in start.tensors.values())
    return {name: tensor + size / count**0.5 for name, tensor in start.tensors.items()}


def reason(update: Update, job: Job, max_norm: float | None = None) -> str | None:
    return reject_reason(update, job, job.payload.adapter.tensors, max_norm)


def refused(update: Update, job: Job, max_norm: float | None = None) -> str:
    """Return the one sentence that an update is refused with."""
    found = reason(update, job, max_norm)
    assert found is not None
    assert found.startswith("client ")
    assert "\n" not in found
    return found


# honest


@quick
@given(seeds, st.integers(1, 6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_an_honest_update_passes(seed: int, rank: int, dtype: torch.dtype) -> None:
    job = job_of(download(seed, rank, dtype))
    update = update_of(job, shifted(job.payload.adapter, 0.5 * BOUND))
    assert reason(update, job) is None
    assert reason(update, job, BOUND) is None


@quick
@given(seeds, st.integers(2, 6), st.data())
def test_a_smaller_rank_passes(seed: int, rank: int, data: st.DataObject) -> None:
    job = job_of(download(seed, rank))
    own = algebra.truncate(job.payload.adapter, data.draw(st.integers(1, rank)))
    assert reason(replace(update_of(job), adapter=own), job) is None


def test_a_part_of_the_download_passes_if_only_that_is_expected() -> None:
    job = job_of(download())
    update = replace(update_of(job), adapter=job.payload.adapter.select(lambda n: n == B))
    assert reject_reason(update, job, {B: job.payload.adapter[B]}) is None


def test_who_did_no_step_needs_no_loss() -> None:
    job = job_of(download())
    update = replace(update_of(job), num_steps=0, metrics={"loss": float("nan")})
    assert reason(update, job) is None


def test_meta_tensors_are_checked_for_form_only() -> None:
    start = download()
    meta = replace(start, tensors={n: t.to("meta") for n, t in start.tensors.items()})
    job = job_of(meta)
    assert reason(update_of(job), job, BOUND) is None
    assert reason(update_of(job, start.tensors), job, BOUND) is None
    assert "'q.lora_A'" in refused(update_of(job, {A: meta[A][:, :3]}), job)


def test_whole_numbers_pass_if_whole_numbers_are_expected() -> None:
    index = torch.arange(5)
    job = job_of(Adapter({"q.index": index}))
    assert reason(update_of(job, {"q.index": index + 1000}), job, BOUND) is None


def test_checking_modifies_nothing() -> None:
    job = job_of(download())
    update = update_of(job, shifted(job.payload.adapter, 1.0))
    before = (update.adapter.digest(), job.payload.adapter.digest())
    reason(update, job, BOUND)
    assert (update.adapter.digest(), job.payload.adapter.digest()) == before


# each kind of fault


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"cid": 4}, "client 4 answered the job of client 3"),
        ({"version": 6}, "client 3 started from version 6, its job from version 7"),
        ({"num_samples": 0}, "claims 0 training rows, at least 1"),
        ({"num_samples": 1000}, "claims 1000 training rows, 12 expected"),
        ({"num_steps": -1}, "claims -1 steps"),
        ({"num_steps": 10**9}, "claims 1000000000 steps"),
        ({"metrics": {"loss": float("nan")}}, "a loss of nan"),
        ({"metrics": {"loss": float("inf")}}, "a loss of inf"),
    ],
)
def test_a_wrong_envelope_is_named(fault: dict[str, Any], words: str) -> None:
    job = job_of(download())
    assert words in refused(replace(update_of(job), **fault), job)


def test_missing_and_unexpected_tensors_are_named() -> None:
    job = job_of(download())
    renamed = {{A: "q.lora_C"}.get(n, n): t for n, t in job.payload.adapter.tensors.items()}
    update = replace(update_of(job), adapter=replace(job.payload.adapter, tensors=renamed))
    assert refused(update, job) == (
        "client 3 sent unexpected tensors ('q.lora_C') and did not send expected tensors"
        " ('q.lora_A')"
    )


def test_many_missing_tensors_still_make_one_short_sentence() -> None:
    job = job_of(download())
    update = replace(update_of(job), adapter=job.payload.adapter.select(lambda n: False))
    assert refused(update, job).endswith("and 2 more)")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (A, (4, 15)),  # other axis
        (A, (5, 14)),  # larger rank
        (A, (0, 14)),
        (A, (4, 14, 1)),
        (B, (19, 4)),
        (HEAD, (2, 14)),  # a head has no rank
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    job = job_of(download())
    found = refused(update_of(job, {name: torch.zeros(shape)}), job)
    wanted = tuple(job.payload.adapter[name].shape)
    assert found == f"client 3 sent '{name}' of shape {shape}, {wanted} expected"


def test_two_ranks_in_one_path_are_named() -> None:
    job = job_of(download())
    found = refused(update_of(job, {A: torch.zeros(2, 14)}), job)
    assert "'q.lora_A' of rank 2" in found or "'q.lora_B' of rank 4 and 'q.lora_A'" in found


def test_a_core_has_the_rank_of_its_path_on_both_sides() -> None:
    core = name_core("q")
    job = job_of(download().overlaid({core: torch.eye(4)}))
    assert reason(update_of(job), job) is None
    assert "rank" in refused(update_of(job, {core: torch.ones(4, 3)}), job)
    assert "rank" in refused(update_of(job, {core: torch.eye(3)}), job)


def test_a_wrong_dtype_is_named() -> None:
    job = job_of(download())
    found = refused(update_of(job, {B: job.payload.adapter[B].half()}), job)
    assert found == "client 3 sent 'q.lora_B' as float16, float32 expected"


@pytest.mark.parametrize("scaling", [{}, {"q": 1e9}, {"q": float("nan")}])
def test_a_scaling_that_would_multiply_the_product_is_named(scaling: dict[str, float]) -> None:
    job = job_of(download())
    own = replace(job.payload.adapter, scaling=scaling)
    assert "path 'q' with scaling" in refused(replace(update_of(job), adapter=own), job)


def test_another_routing_is_named() -> None:
    routing = Routing(("", "local"), top=1)
    job = job_of(replace(download(), routing=routing))
    own = replace(job.payload.adapter, routing=replace(routing, top=2))
    assert reason(update_of(job), job) is None
    assert "another routing" in refused(replace(update_of(job), adapter=own), job)


def test_values_that_are_not_finite_are_counted_and_placed() -> None:
    job = job_of(download())
    broken = job.payload.adapter[B].clone()
    broken[2, 1], broken[5, 0] = float("-inf"), float("nan")
    found = refused(update_of(job, {B: broken}), job)
    assert found.endswith("'q.lora_B' with 2 of 80 values not finite, the first -inf at (2, 1)")


def test_the_norm_is_that_of_the_whole_change() -> None:
    start = Adapter({"x": torch.full((2,), 100.0), "y": torch.zeros(1)})
    job = job_of(start)
    moved = {"x": start["x"] + torch.tensor([1.0, 2.0]), "y": torch.tensor([2.0])}
    assert reason(update_of(job, moved), job, 3.0) is None
    found = refused(update_of(job, moved), job, 2.99)
    assert "norm 3, at most 2.99 expected; 'x' alone has 2.236" in found


def test_what_was_not_downloaded_in_this_shape_is_measured_from_zero() -> None:
    job = job_of(Adapter({"x": torch.full((3,), 100.0)}))
    expected = {"x": torch.zeros(2), "y": torch.zeros(1)}
    sent = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([2.0])}
    update = replace(update_of(job), adapter=Adapter(sent))
    assert reject_reason(update, job, expected, 3.0) is None
    assert "norm 3," in (reject_reason(update, job, expected, 2.99) or "")


# any single mutation


def _renamed(own: Adapter, name: str, where: int) -> Adapter:
    tensors = {(n + "x" if n == name else n): t for n, t in own.tensors.items()}
    return replace(own, tensors=tensors)


def _reshaped(own: Adapter, name: str, where: int) -> Adapter:
    return own.overlaid({name: own[name].flatten()})


def _shortened(own: Adapter, name: str, where: int) -> Adapter:
    axis = where % own[name].dim()
    return own.overlaid({name: own[name].narrow(axis, 0, own[name].shape[axis] - 1)})


def _poisoned(own: Adapter, name: str, where: int) -> Adapter:
    tensor = own[name].clone()
    tensor.view(-1)[where % tensor.numel()] = float("nan")
    return own.overlaid({name: tensor})


def _recast(own: Adapter, name: str, where: int) -> Adapter:
    return own.overlaid({name: own[name].double()})


def _scaled(own: Adapter, name: str, where: int) -> Adapter:
    return own.overlaid({name: own[name] * 1e6})


@quick
@given(
    seeds,
    st.integers(2, 6),
    st.integers(0, 10**6),
    st.sampled_from([_renamed, _reshaped, _shortened, _poisoned, _recast, _scaled]),
    st.data(),
)
def test_every_single_mutation_is_caught(
    seed: int, rank: int, where: int, mutate: Any, data: st.DataObject
) -> None:
    job = job_of(download(seed, rank))
    honest = update_of(job, shifted(job.payload.adapter, 0.5 * BOUND))
    name = data.draw(st.sampled_from(list(honest.adapter)))
    mutated = replace(honest, adapter=mutate(honest.adapter, name, where))
    assert reason(honest, job, BOUND) is None
    assert name in refused(mutated, job, BOUND)
