"""Messages through codecs, over whole runs: one copy of everything on both sides, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.setups import SETUPS, Setup, each_setup
from conformance.world import CLIENTS, HEAD, SHAPES, Federation, effective, start_adapter
from loop_worlds import Slow, fate, loop_of
from torch import Tensor

from fedllm.adapters import is_note, layer_of, wire
from fedllm.federation import Job, Update, visible
from fedllm.federation.transport import Transport
from fedllm.simulation import Loop, Reception

INT8, NF4 = wire.make("int8"), wire.make("nf4")
TOPK = wire.make("topk", share=0.25)
ROUNDS = 5
COHORT = 3

with_feedback = pytest.mark.parametrize(
    "setup", [s for s in SETUPS if not s.start().server.recoordinated], ids=str
)


def through(fed: Federation, uplink: Any = None, downlink: Any = None) -> Loop:
    """Return the loop in which messages are packed, three clients a round."""
    loop = loop_of(
        fed,
        COHORT,
        Slow(),
        reception=Reception(Transport(uplink or wire.make("fp32"), downlink or INT8)),
    )
    fed.server.downlink = loop.reception.transport.downlink
    return loop


def watched(loop: Loop) -> list[tuple[Job, Update]]:
    """Return a list that fills with what each client was given and what it made of it."""
    seen: list[tuple[Job, Update]] = []
    inner = loop.executor.run  # type: ignore[attr-defined]

    def spying(jobs: Sequence[Job]) -> Any:
        updates = inner(jobs)
        seen.extend(zip(jobs, updates, strict=True))
        return updates

    loop.executor.run = spying  # type: ignore[method-assign]
    return seen


def packed_nbytes(codec: Any, tensor: Tensor) -> int:
    """Return the bytes of what is really sent of a tensor."""
    return sum(part.nbytes for part in codec.encode(tensor).values())


def increments(fed: Federation, codec: Any) -> dict[int, tuple[dict[str, Tensor], int]]:
    """Return a mapping that fills with what arrives of each version's increment, and its bytes."""
    made: dict[int, tuple[dict[str, Tensor], int]] = {}
    inner = fed.server.merge

    def merging(increment: Any) -> None:
        arrived, nbytes = {}, 0
        for path, (b, a) in increment.items():
            nbytes += packed_nbytes(codec, b) + packed_nbytes(codec, a)
            arrived[layer_of(path)] = codec.round_trip(b) @ codec.round_trip(a)
        made[fed.server.version + 1] = arrived, nbytes
        inner(increment)

    fed.server.merge = merging  # type: ignore[method-assign]
    return made


# down


@each_setup
@pytest.mark.parametrize("head", ["shared", "local"])
def test_a_client_holds_what_a_second_sending_would_bring(setup: Setup, head: Any) -> None:
    loop = through(setup.start(head=head), downlink=INT8)
    seen = watched(loop)
    list(loop.run(ROUNDS))
    held: dict[int, dict[str, Tensor]] = {cid: {} for cid in CLIENTS}
    for job, _ in seen:
        payload, own = job.payload, held[job.cid]
        for name, tensor in payload.adapter.tensors.items():
            if name in payload.known and name in own:
                assert torch.equal(tensor, own[name]), name
            elif name not in payload.known and tensor.is_floating_point():
                assert torch.equal(tensor, INT8.round_trip(tensor)), name
        own |= payload.adapter.tensors
    assert max(len([job for job, _ in seen if job.cid == cid]) for cid in CLIENTS) > 1


@pytest.mark.parametrize("codec", [INT8, NF4], ids=["int8", "nf4"])
@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_who_adds_up_the_packed_increments_has_the_servers_base(name: str, codec: Any) -> None:
    fed = Federation(name)
    loop = through(fed, downlink=codec)
    made = increments(fed, codec)
    seen = watched(loop)
    rows = [row for done in loop.run(ROUNDS) for row in done.ledger]
    down = {(row["round"] - 1, row["client"]): row["down_bytes"] for row in rows}
    held = {cid: {m: torch.zeros(s).double() for m, s in SHAPES.items()} for cid in CLIENTS}
    for job, _ in seen:
        payload = job.payload
        lacking = [made[v] for v in made if max(payload.known_base, 0) < v <= job.version]
        for arrived, _ in lacking:
            for layer, matrix in arrived.items():
                held[job.cid][layer] = held[job.cid][layer] + matrix
        now = {m: p.dense() for m, p in payload.base.as_products().items()}
        for layer, matrix in held[job.cid].items():
            wanted = now.get(layer, torch.zeros(SHAPES[layer]).double())
            torch.testing.assert_close(matrix, wanted, atol=1e-12, rtol=1e-12)
        # the sum would not be the same base if it were packed once more, so it travels in full
        whole = [
            *payload.base.dense.values(),
            *(t for p in payload.base.products.values() for t in p),
        ]
        base = min(sum(nbytes for _, nbytes in lacking), sum(t.nbytes for t in whole))
        sent = sum(packed_nbytes(codec, tensor) for tensor in payload.sent.values())
        assert down[job.version, job.cid] == base + sent
    assert any(0 <= job.payload.known_base < job.version - 1 for job, _ in seen)


def test_what_travels_in_both_directions_arrives_with_its_own_memory() -> None:
    fed = Federation("scaffold")
    done = fed.train(CLIENTS)
    job, update = done.jobs[0], done.updates[0]
    transport = Transport(NF4, NF4)
    before = {n: t.clone() for n, t in update.adapter.tensors.items()}
    arrived, _ = transport.send_up(update, job)
    down = transport.send_down(job.payload, fed.server)
    for name, tensor in arrived.adapter.tensors.items():
        assert tensor.data_ptr() != update.adapter[name].data_ptr()
        assert torch.equal(update.adapter[name], before[name])
    assert set(arrived.extra) == set(update.extra) != set()
    assert set(down.extra) == set(job.payload.extra) != set()
    assert any(not torch.equal(arrived.extra[n], t) for n, t in update.extra.items())


# up


@each_setup
@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_what_an_upload_costs_is_known_before_training(setup: Setup, codec: str) -> None:
    fed = setup.start()
    if codec == "topk" and fed.server.recoordinated:
        codec = "nf4"
    loop = through(fed, wire.make(codec))
    transport = loop.reception.transport
    seen = watched(loop)
    rows = [row for made in loop.run(ROUNDS) for row in made.ledger]
    guessed = {(job.version + 1, job.cid): transport.up_nbytes(fed.client, job) for job, _ in seen}
    sent = {(job.version + 1, job.cid): transport.send_up(up, job)[1] for job, up in seen}
    assert guessed == sent == {(row["round"], row["client"]): row["up_bytes"] for row in rows}


@with_feedback
def test_feedback_loses_nothing_over_a_run(setup: Setup) -> None:
    fed = setup.start()
    loop = through(fed, TOPK, wire.make("fp32"))
    seen = watched(loop)
    arrived: dict[tuple[int, int], Update] = {}
    for made in loop.run(ROUNDS):
        arrived |= {(made.number - 1, update.cid): update for update in made.updates}
    gaps: dict[tuple[int, str], Tensor] = {}
    for job, update in seen:
        got = arrived[job.version, job.cid]
        for prefix, sent, made in (
            ("", got.adapter.tensors, update.adapter.tensors),
            ("~extra/", got.extra, update.extra),
        ):
            for name, tensor in made.items():
                key = (job.cid, prefix + name)
                gaps[key] = gaps.get(key, 0.0) + tensor - sent[name]
    owed = {
        (cid, name.removeprefix("~owed/")): tensor
        for cid in fed.store.clients()
        for name, tensor in fed.store.get(cid).items()
        if name.startswith("~owed/")
    }
    assert set(owed) == set(gaps)
    for key, tensor in gaps.items():
        # what was trained less what arrived: a part of each is the next change, so they add up
        torch.testing.assert_close(owed[key], tensor, atol=1e-9, rtol=1e-9)
    assert any(float(tensor.norm()) > 0 for tensor in owed.values())


@with_feedback
def test_what_is_owed_is_seen_by_nobody(setup: Setup) -> None:
    fed = setup.start()
    loop = through(fed, TOPK, wire.make("fp32"))
    seen = watched(loop)
    list(loop.run(ROUNDS))
    kept = [fed.store.get(cid) for cid in fed.store.clients()]
    assert any(name.startswith("~owed/") for state in kept for name in state)
    for cid in fed.store.clients():
        state = fed.store.get(cid)
        assert not any(is_note(name) for name in visible(state))
        view = fed.server.view(cid, state)
        assert not any(is_note(name) for name in view.adapter)
        assert set(effective(view.adapter, view.base)) >= {HEAD}
    for job, update in seen:
        for message in (update.adapter, update.extra, job.payload.adapter, job.payload.extra):
            assert not any(is_note(name) for name in message)


def test_a_run_with_feedback_goes_on_where_it_stopped() -> None:
    whole = through(Federation("fedsa-lora"), TOPK)
    list(whole.run(4))
    first = through(Federation("fedsa-lora"), TOPK)
    list(first.run(2))
    second = through(Federation("fedsa-lora"), TOPK)
    second.restore(first.state())
    list(second.run(4))
    assert fate(second) == fate(whole)


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "nf4"])
def test_a_lossy_link_brings_noise_but_no_drift(codec: str) -> None:
    # what the server holds is the mean of what arrived, and what arrived is within the codec's step
    fed = Federation("fedit")
    loop = through(fed, wire.make(codec), wire.make("fp32"))
    seen = watched(loop)
    list(loop.run(1))
    total = sum(update.num_samples for _, update in seen)
    for name in start_adapter(4, torch.float64):
        mean = sum(up.adapter[name] * up.num_samples for _, up in seen) / total
        gap = (fed.server.adapter[name] - mean).abs().max()
        largest = max(float(up.adapter[name].abs().max()) for _, up in seen)
        assert 0 < gap <= largest * {"fp16": 1e-3, "bf16": 8e-3, "int8": 8e-3, "nf4": 0.16}[codec]
