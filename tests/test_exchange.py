"""Between clients and the algorithm: codecs, validation, fidelity, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conformance.cases import CASES, Case
from conformance.world import CLIENTS, HEAD, SHAPES, FakeEngine, Federation, effective
from loop_worlds import loop_of

from fedllm.adapters import Adapter, is_note, name_a, name_b, wire
from fedllm.errors import ConfigError, TrainingError
from fedllm.experiment import make_config
from fedllm.federation import FitRequest, FitResult, Job, Part, Progress, visible
from fedllm.federation.fidelity import aggregation_error
from fedllm.federation.privacy import ClientPrivacy
from fedllm.federation.robust import Median
from fedllm.federation.transport import Transport
from fedllm.simulation import Reception

LOSSY = ("fp16", "bf16", "int8", "nf4")


def serialised(codec: wire.WireCodec, adapter: Adapter) -> int:
    """Return the bytes of what is really sent of an adapter."""
    return sum(
        part.nbytes for tensor in adapter.tensors.values() for part in codec.encode(tensor).values()
    )


# transport


@pytest.mark.parametrize("name", ["fp32", *LOSSY])
@pytest.mark.parametrize("algorithm", ["fedit", "ffa-lora", "rolora", "ravan", "scaffold"])
def test_the_ledger_counts_the_bytes_that_are_sent(name: str, algorithm: str) -> None:
    codec = wire.make(name)
    settings = {"heads": 2} if algorithm == "ravan" else {}
    fed = Federation(algorithm, settings)
    loop = loop_of(fed, reception=Reception(Transport(uplink=codec, downlink=codec)))
    sent: dict[tuple[int, int], int] = {}
    inner = loop.executor.run  # type: ignore[attr-defined]

    def spying(jobs: Sequence[Job]) -> Any:
        updates = inner(jobs)
        for update in updates:
            extra = Adapter(dict(update.extra))
            key = (update.version + 1, update.cid)
            sent[key] = serialised(codec, update.adapter) + serialised(codec, extra)
        return updates

    loop.executor.run = spying  # type: ignore[method-assign]
    rows = [row for made in loop.run(3) for row in made.ledger]
    assert {(row["round"], row["client"]): row["up_bytes"] for row in rows} == sent
    plain = [row for made in loop_of(Federation(algorithm, settings)).run(3) for row in made.ledger]
    smaller = name != "fp32"
    for row, full in zip(rows, plain, strict=True):
        assert (row["up_bytes"] < full["up_bytes"]) == smaller
        assert (row["down_bytes"] < full["down_bytes"]) == smaller


@pytest.mark.parametrize("name", LOSSY)
def test_a_codec_changes_what_is_learned_a_little(name: str) -> None:
    views = []
    for codec in (wire.make("fp32"), wire.make(name)):
        loop = loop_of(
            Federation("fedit"), reception=Reception(Transport(uplink=codec, downlink=codec))
        )
        list(loop.run(3))
        views.append(effective(loop.server.view().adapter, loop.server.base))
    for layer in SHAPES:
        gap = float((views[0][layer] - views[1][layer]).norm() / views[0][layer].norm())
        assert 0 < gap < 0.5


def test_what_all_draw_from_the_seed_stays_exact() -> None:
    fed = Federation("ffa-lora").run(rounds=1)
    job = fed.jobs([0])[0]
    arrived = Transport(downlink=wire.make("nf4")).send_down(job.payload, fed.server)
    for layer in SHAPES:
        assert torch.equal(arrived.adapter[name_a(layer)], job.payload.adapter[name_a(layer)])
        assert not torch.equal(arrived.adapter[name_b(layer)], job.payload.adapter[name_b(layer)])


def test_server_and_clients_hold_the_same_packed_base() -> None:
    fed = Federation("flora")
    fed.server.downlink = wire.make("int8")
    exact = Federation("flora")
    fed.round([0])
    exact.round([0])
    assert set(fed.server.base.products) == set(SHAPES)
    for layer, (b, a) in fed.server.base.products.items():
        for packed, raw in zip((b, a), exact.server.base.products[layer], strict=True):
            assert torch.equal(packed, wire.make("int8").round_trip(packed))
            assert not torch.equal(packed, raw)
    payload = fed.jobs([0])[0].payload
    assert payload.base is fed.server.base
    held = sum(t.nbytes for pair in fed.server.base.products.values() for t in pair)
    assert 0 < fed.server.base.nbytes_since(-1, fed.server.downlink) < held / 4


def test_error_feedback_loses_nothing_in_the_end() -> None:
    transport = Transport(uplink=wire.make("topk", share=0.25))
    fed = Federation("fedit")
    total: dict[str, torch.Tensor] = {}
    arrived_total: dict[str, torch.Tensor] = {}
    for _ in range(4):
        done = fed.train([1])
        (job,), (update,) = done.jobs, done.updates
        arrived, nbytes = transport.send_up(update, job)
        assert nbytes == transport.up_nbytes(fed.client, job) < update.nbytes
        start = job.payload.adapter
        for name in update.adapter:
            total[name] = total.get(name, 0.0) + update.adapter[name] - start[name]
            moved = arrived.adapter[name] - start[name]
            arrived_total[name] = arrived_total.get(name, 0.0) + moved
        fed.store.put(1, arrived.state)
        fed.server.apply([Part(1.0, arrived)])
    owed = {n.partition("/")[2]: t for n, t in fed.store.get(1).items()}
    assert visible(fed.store.get(1)) == {}
    assert all(is_note(n) for n in fed.store.get(1))
    for name, tensor in total.items():
        torch.testing.assert_close(arrived_total[name] + owed[name], tensor, atol=1e-9, rtol=1e-9)
        assert float(owed[name].norm()) > 0


# fidelity


def error_of(fed: Federation, cohort: Sequence[int] = CLIENTS) -> float | None:
    """Do a round and return how far its aggregate is from the ideal."""
    done = fed.train(cohort)
    fed.finish(done)
    parts = [Part(fed.server.weight(u), u) for u in done.updates]
    return aggregation_error(fed.server, parts, {job.cid: job for job in done.jobs})


def test_fedits_error_is_the_weighted_product_of_deviations() -> None:
    fed = Federation("fedit").run(rounds=1)
    fork = fed.fork()
    found = error_of(fed)
    done = fork.round()
    squares = 0.0
    for layer in SHAPES:
        a = {k: t[name_a(layer)] for k, t in done.trained.items()}
        b = {k: t[name_b(layer)] for k, t in done.trained.items()}
        mean_a = sum(p * a[k] for k, p in done.shares.items())
        mean_b = sum(p * b[k] for k, p in done.shares.items())
        gap = sum(p * (b[k] - mean_b) @ (a[k] - mean_a) for k, p in done.shares.items())
        squares += float((fork.server.adapter.scaling[layer] * gap).square().sum())
    assert found == pytest.approx(squares**0.5, rel=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=str)
def test_exact_methods_show_their_rounding_and_nothing_else(case: Case) -> None:
    fed = Federation(case.name, case.settings)
    for cohort in (CLIENTS, (0, 2), (1, 2, 3)):
        found = error_of(fed, cohort)
        assert found is not None
        assert found < 1e-10


def test_alignment_lowers_the_error_and_fedit_has_more() -> None:
    errors = {}
    for name, settings in (("fedit", {}), ("fedrot-lora", {"strength": 1.0}), ("lora-fair", {})):
        fed = Federation(name, settings, engine=FakeEngine("quadratic"), learning_rate=2e-2)
        errors[name] = [error_of(fed) for _ in range(4)]
    assert errors["lora-fair"][0] < errors["fedit"][0]  # type: ignore[operator]
    assert errors["fedrot-lora"][0] == pytest.approx(errors["fedit"][0])  # nothing in round 0
    assert min(e for found in errors.values() for e in found if e is not None) > 0


def test_a_personal_method_is_compared_with_its_own_b() -> None:
    fed = Federation("fedsa-lora").run(rounds=1)
    fork = fed.fork()
    found = error_of(fed)
    done = fork.round()
    squares = 0.0
    for layer in SHAPES:
        shared = fork.server.adapter[name_a(layer)]
        gap = sum(
            p * done.trained[k][name_b(layer)] @ (shared - done.trained[k][name_a(layer)])
            for k, p in done.shares.items()
        )
        squares += float((fork.server.adapter.scaling[layer] * gap).square().sum())
    assert found == pytest.approx(squares**0.5, rel=1e-9)


@pytest.mark.parametrize("name", ["fedlease", "fedalt"])
def test_methods_without_a_mean_have_no_error(name: str) -> None:
    assert error_of(Federation(name)) is None


# validation in the loop


@dataclass
class Faulty(FakeEngine):
    """Spoils what some clients have trained."""

    bad: frozenset[int] = frozenset()

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        found = super().train(requests, progress)
        return [
            self._spoilt(result) if request.job.cid in self.bad else result
            for request, result in zip(requests, found, strict=True)
        ]

    def _spoilt(self, result: FitResult) -> FitResult:
        name = next(n for n in result.adapter if n != HEAD)
        tensor = result.adapter[name].clone()
        tensor[0, 0] = float("nan")
        return replace(result, adapter=result.adapter.overlaid({name: tensor}))


def test_a_bad_client_is_counted_and_the_others_go_on_without_it() -> None:
    fed = Federation("fedsa-lora", engine=Faulty(bad=frozenset({2})))
    rounds = list(loop_of(fed).run(2))
    for made in rounds:
        assert [row["client"] for row in made.rejected] == [2]
        assert "not finite" in made.rejected[0]["reason"]
        assert [update.cid for update in made.updates] == [0, 1, 3]
    assert fed.store.get(2) == {}  # what it trained is not to be trusted
    others = Federation("fedsa-lora")
    for _ in range(2):
        others.round([0, 1, 3])
    assert fed.server.adapter.digest() == others.server.adapter.digest()


def test_a_round_of_which_nothing_is_left_stops_the_run() -> None:
    fed = Federation("fedit", engine=Faulty(bad=frozenset(CLIENTS)))
    with pytest.raises(TrainingError, match=r"every update .*client 0 .*and 1 more"):
        list(loop_of(fed).run(1))


def test_a_change_that_is_too_large_is_rejected() -> None:
    fed = Federation("fedit")
    loop = loop_of(fed, reception=Reception(max_norm=1e-6))
    with pytest.raises(TrainingError, match=r"norm .*updates.max_norm"):
        list(loop.run(1))


def test_the_median_withstands_a_client_that_the_mean_does_not() -> None:
    def moved(reception: Reception, scale: float) -> float:
        fed = Federation("ffa-lora")
        loop = loop_of(fed, reception=reception)
        inner = loop.executor.run  # type: ignore[attr-defined]

        def poisoned(jobs: Sequence[Job]) -> Any:
            return [scaled(u) if u.cid == 3 else u for u in inner(jobs)]

        def scaled(update: Any) -> Any:
            large = {n: t * scale for n, t in update.adapter.tensors.items()}
            return replace(update, adapter=update.adapter.overlaid(large))

        loop.executor.run = poisoned  # type: ignore[method-assign]
        list(loop.run(1))
        return max(float(fed.global_view()[layer].norm()) for layer in SHAPES)

    assert moved(Reception(), 1e6) > 1e3
    assert moved(Reception(robust=Median()), 1e6) == pytest.approx(
        moved(Reception(robust=Median()), 1e5)
    )


def test_noise_follows_from_the_seed() -> None:
    digests = []
    for seed in (1, 1, 2):
        loop = loop_of(
            Federation("ffa-lora"), reception=Reception(privacy=ClientPrivacy(1.0, 0.5, 1e-5, seed))
        )
        list(loop.run(2))
        digests.append(loop.server.adapter.digest())
    assert digests[0] == digests[1] != digests[2]


# configuration

PRIVATE = {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}
MEDIAN = {"robust": "median"}
TOPK = {"uplink": "topk"}


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"communication": {"uplink": "int9"}}, ["communication.uplink", "Did you mean 'int8'"]),
        ({"communication": {"downlink": "topk"}}, ["communication.downlink", "for changes"]),
        ({"communication": {"uplink": {"name": "topk", "share": 2}}}, ["uplink.share"]),
        ({"updates": {"robust": "medain"}}, ["updates.robust", "Did you mean 'median'"]),
        ({"updates": {"robust": "krum"}}, ["updates.robust.byzantine", "needs a value"]),
        ({"algorithm": "flora", "updates": MEDIAN}, ["updates.robust: not defined for 'flora'"]),
        ({"algorithm": "flexlora", "updates": PRIVATE}, ["updates.privacy: not defined", "SVD"]),
        ({"algorithm": "fedsvd", "communication": TOPK}, ["communication.uplink: not defined"]),
        ({"updates": {**MEDIAN, **PRIVATE}}, ["before noise is added"]),
        ({"algorithm": "scaffold", "updates": PRIVATE}, ["control variates", "no noise"]),
        ({"algorithm": "scaffold", "updates": MEDIAN}, ["control variates", "krum or norm-bound"]),
        (
            {"algorithm": "ffa-lora", "adapter": {"rank": [2, 4]}, "updates": MEDIAN},
            ["unequal rank"],
        ),
        (
            {
                "federation": {"num_clients": 4},
                "updates": {"robust": {"name": "krum", "byzantine": 1}},
            },
            ["a cohort of at least 5"],
        ),
        ({"updates": {"privacy": {"clip": 0, "noise_multiplier": 1}}}, ["updates.privacy.clip"]),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_reason(
    tree: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as told:
        make_config(tree)
    for part in parts:
        assert part in str(told.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"communication": {"uplink": "nf4", "downlink": "bf16"}, "algorithm": "flora"},
        {"communication": TOPK, "algorithm": "rolora"},
        {"updates": {**PRIVATE, "robust": {"name": "norm-bound", "bound": 2.0}}},
        {"updates": MEDIAN, "algorithm": "ditto"},
        {"updates": PRIVATE, "algorithm": {"name": "ffa-lora", "optimizer": "fedadam"}},
    ],
)
def test_what_has_a_meaning_is_accepted(tree: dict[str, Any]) -> None:
    config = make_config(tree)
    assert make_config(config.model_dump(mode="json")) == config
