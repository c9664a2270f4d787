"""What the specification says of methods in which clients keep an adapter of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.sanitiser import digest
from conformance.world import (
    CLIENTS,
    HEAD,
    NUM_SAMPLES,
    RANK,
    SCALING,
    SHAPES,
    FakeEngine,
    Federation,
    Round,
    assert_same,
    noise,
    path_product,
)
from torch import Tensor

from fedllm.adapters import Adapter, in_slot, is_head, name_a, name_b, name_router, slot_of
from fedllm.algorithms import server_class
from fedllm.federation import FitResult, Mix, Part, Update
from fedllm.federation.fidelity import aggregation_error

COHORTS = [(0, 1, 2), (1, 3), (0, 2), (0, 1, 2, 3), (2, 3), (1,)]
"""Three rounds and more, with absences of one, two and three rounds."""
LOCAL = "local"


def plain(adapter: Adapter) -> dict[str, str]:
    """Hash what is in no slot, routers left out."""
    return {n: digest(t) for n, t in adapter.tensors.items() if not slot_of(n)}


def in_(slot: str, adapter: Adapter) -> dict[str, str]:
    """Hash what is in a slot, under plain names."""
    return {in_slot(n, ""): digest(t) for n, t in adapter.tensors.items() if slot_of(n) == slot}


def fits_of(done: Round, cid: int) -> list[tuple[Adapter, Adapter]]:
    """Return start and end of each of a client's passes."""
    return [(r.start, end.adapter) for r, end in done.fits if r.job.cid == cid]


def same_everywhere(fed: Federation, base: Federation) -> None:
    """Assert that both hold the same global model, bit for bit."""
    assert plain(fed.server.adapter) == plain(base.server.adapter)
    assert fed.server.view().adapter.digest() == base.server.view().adapter.digest()


# local-only


def test_local_only_moves_no_byte() -> None:
    fed = Federation("local-only")
    for cohort in COHORTS:
        done = fed.round(cohort)
        assert all(job.payload.nbytes == 0 for job in done.jobs)
        assert all(update.nbytes == 0 for update in done.updates)
        assert not any(fed.global_view()[m].any() for m in SHAPES)


@pytest.mark.parametrize("name", ["local-only", "fedit"])
def test_local_only_is_training_alone_with_an_optimiser_that_starts_anew(name: str) -> None:
    # FedIT with one client in its cohorts is just that
    fed, alone = Federation("local-only"), Federation(name)
    for cohort in COHORTS:
        fed.round(cohort)
        alone.round([2]) if 2 in cohort else alone.server.apply([])
    ours = fed.server.view(2, fed.store.get(2)).adapter
    theirs = alone.server.view(2, alone.store.get(2)).adapter
    assert ours.digest() == theirs.digest()
    assert any(t.any() for n, t in ours.tensors.items() if n == name_b("h.0.c_attn"))


# fine-tune


def test_fine_tuning_of_no_round_is_fedit() -> None:
    fed, base = Federation("fine-tune", {"tune_rounds": 0}), Federation("fedit")
    for cohort in COHORTS:
        fed.round(cohort)
        base.round(cohort)
        same_everywhere(fed, base)
        assert fed.store.clients() == []
    assert all(
        fed.server.view(cid).adapter.digest() == base.server.view().adapter.digest()
        for cid in CLIENTS
    )


def test_fine_tuning_leaves_the_global_model_alone_and_asks_everyone() -> None:
    fed = Federation("fine-tune", {"tune_rounds": 2})
    for _ in range(4):
        assert len(fed.sampled(2)) == 2
        fed.round(fed.sampled(2))
    rest = fed.server.adapter.digest()
    own: dict[int, Adapter] = {}
    for number in range(2):
        assert list(fed.sampled(2)) == list(CLIENTS)
        done = fed.round()
        assert fed.server.adapter.digest() == rest
        for job, update in zip(done.jobs, done.updates, strict=True):
            ((start, end),) = fits_of(done, job.cid)
            wanted = own.get(job.cid, fed.server.adapter)
            assert plain(start) == plain(wanted)
            assert len(update.adapter) == 0
            assert (job.payload.nbytes == 0) == (number == 1)
            own[job.cid] = end
    for cid in CLIENTS:
        assert plain(fed.server.view(cid, fed.store.get(cid)).adapter) == plain(own[cid])
        assert plain(own[cid]) != plain(fed.server.adapter)


# Ditto


@pytest.mark.parametrize("strength", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_the_global_model_of_ditto_is_fedit_bit_for_bit(strength: float, head: Any) -> None:
    fed = Federation("ditto", {"strength": strength}, head=head)
    base = Federation("fedit", head=head)
    for cohort in COHORTS:
        ours, theirs = fed.round(cohort), base.round(cohort)
        same_everywhere(fed, base)
        assert [u.adapter.digest() for u in ours.updates] == [
            replace(u.adapter, scaling=o.adapter.scaling).digest()
            for u, o in zip(theirs.updates, ours.updates, strict=True)
        ]


def test_ditto_without_pull_is_local_training_bit_for_bit() -> None:
    fed, alone = Federation("ditto", {"strength": 0.0}), Federation("local-only")
    for cohort in COHORTS:
        fed.round(cohort)
        alone.round(cohort)
    for cid in CLIENTS:
        ours, theirs = (f.server.view(cid, f.store.get(cid)).adapter for f in (fed, alone))
        assert ours.digest() == theirs.digest()


def test_a_strong_pull_leaves_the_personal_model_at_the_download() -> None:
    fed = Federation("ditto", {"strength": 0.0}, steps=3).run(rounds=2)
    fed.server.strength, fed.learning_rate = 1e7, 1e-7  # type: ignore[attr-defined]
    before = fed.client_view(1)
    done = fed.round()
    received = done.before.adapter
    view = fed.server.view(1, fed.store.get(1)).adapter
    assert float((before[HEAD] - received[HEAD]).norm()) > 1e-2
    for name in received:
        assert float((view[name] - received[name]).norm()) < 1e-4


def test_one_step_of_ditto_by_hand() -> None:
    fed = Federation("ditto", {"strength": 0.7}, learning_rate=0.1).run(rounds=2)
    fed.engine.mode, fed.steps = "quadratic", 1
    cid, module = 3, "layers.0.q_proj"
    a, b = name_a(module), name_b(module)
    x, v = fed.server.adapter, fed.server.view(cid, fed.store.get(cid)).adapter
    fed.round()
    gap = SCALING * v[b] @ v[a] - noise(SHAPES[module], "target", cid, module)
    wanted_a = v[a] - 0.1 * (SCALING * v[b].T @ gap + 0.7 * (v[a] - x[a]))
    wanted_b = v[b] - 0.1 * (SCALING * gap @ v[a].T + 0.7 * (v[b] - x[b]))
    now = fed.server.view(cid, fed.store.get(cid)).adapter
    assert_same({a: now[a], b: now[b]}, {a: wanted_a, b: wanted_b})


def test_the_personal_model_of_ditto_and_its_head_stay_with_the_client() -> None:
    fed = Federation("ditto")
    for cohort in COHORTS:
        done = fed.round(cohort)
        for update in done.updates:
            assert not any(slot_of(name) for name in update.adapter)
            assert {slot_of(name) for name in update.state} == {"personal"}
            assert {in_slot(n, "") for n in update.state} == set(update.adapter)
            assert update.num_steps == 2 * fed.steps
    heads = {digest(fed.client_view(cid)[HEAD]) for cid in CLIENTS}
    assert len(heads) == len(CLIENTS)
    assert digest(fed.server.adapter[HEAD]) not in heads


# FedDPA


@pytest.mark.parametrize("name", ["feddpa-t", "feddpa-f", "pfedlora"])
def test_a_local_adapter_is_never_uploaded(name: str) -> None:
    fed = Federation(name)
    for cohort in COHORTS:
        for job, update in zip((done := fed.round(cohort)).jobs, done.updates, strict=True):
            assert not any(slot_of(n) for n in update.adapter)
            assert not any(slot_of(n) for n in job.payload.sent)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("feddpa-t", {}),
        ("pfedlora", {}),
        ("pfedlora", {"order": "global-first"}),
        ("feddpa-f", {"personal_rounds": 3, "mix": 0.5}),
    ],
)
def test_a_pass_over_one_path_leaves_the_other_as_it_is(
    name: str, settings: dict[str, Any]
) -> None:
    fed = Federation(name, settings)
    passes = set()
    for cohort in COHORTS:
        done = fed.round(cohort)
        for request, end in done.fits:
            is_local = request.job.stage == LOCAL
            passes.add(is_local)
            if is_local:
                assert plain(end.adapter) == plain(request.start)
                assert in_(LOCAL, end.adapter) != in_(LOCAL, request.start)
            else:
                assert in_(LOCAL, end.adapter) == in_(LOCAL, request.start)
                assert plain(end.adapter) != plain(request.start)
    assert passes == {True, False}


def test_the_global_adapter_of_feddpa_t_is_fedit_bit_for_bit() -> None:
    # pass (ii) runs without the local path, on the batches that FedIT would take
    fed, base = Federation("feddpa-t"), Federation("fedit")
    for cohort in COHORTS:
        fed.round(cohort)
        base.round(cohort)
        same_everywhere(fed, base)


def test_feddpa_t_begins_its_local_adapters_in_the_second_round_from_nothing() -> None:
    fed = Federation("feddpa-t")
    kept: dict[int, dict[str, str]] = {}
    for number, cohort in enumerate(COHORTS):
        done = fed.round(cohort)
        for cid in cohort:
            fits = fits_of(done, cid)
            assert len(fits) == (1 if number == 0 else 2)
            if number == 0:
                assert fed.store.get(cid) == {}
                continue
            (start, end), _ = fits
            if cid not in kept:
                assert not any(start[name_b(f"{m}:local")].any() for m in SHAPES)
                assert all(start[name_a(f"{m}:local")].any() for m in SHAPES)
            else:
                assert in_(LOCAL, start) == kept[cid]
            kept[cid] = in_(LOCAL, end)
    assert sorted(kept) == list(CLIENTS)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_one_local_step_of_feddpa_t_by_hand(a: float) -> None:
    fed = Federation("feddpa-t", {"mix": a}, learning_rate=0.1).run(rounds=3)
    fed.engine.mode, fed.steps = "quadratic", 1
    cid, module = 0, "h.0.c_attn"
    own_a, own_b = name_a(f"{module}:local"), name_b(f"{module}:local")
    held, state = fed.server.adapter, fed.store.get(cid)
    done = fed.round()
    common = (1 - a) * SCALING * held[name_b(module)] @ held[name_a(module)]
    own = a * SCALING * state[own_b] @ state[own_a]
    gap = common + own - noise(SHAPES[module], "target", cid, module)
    (_, end), (_, last) = fits_of(done, cid)
    wanted = {
        own_a: state[own_a] - 0.1 * a * SCALING * state[own_b].T @ gap,
        own_b: state[own_b] - 0.1 * a * SCALING * gap @ state[own_a].T,
    }
    assert_same({n: end[n] for n in wanted}, wanted)
    # pass (ii) starts from the received adapter, whole and alone
    gap = SCALING * held[name_b(module)] @ held[name_a(module)]
    gap = gap - noise(SHAPES[module], "target", cid, module)
    b = held[name_b(module)] - 0.1 * SCALING * gap @ held[name_a(module)].T
    assert_same({"b": last[name_b(module)]}, {"b": b})
    assert not any(slot_of(name) for name in last)


@pytest.mark.parametrize(("a", "is_free"), [(1.0, True), (0.5, False)])
def test_a_local_adapter_that_trains_alone_does_not_see_the_global_one(
    a: float, is_free: bool
) -> None:
    feds = []
    for shift in (0.0, 3.0):
        fed = Federation("feddpa-t", {"mix": a}, engine=FakeEngine("quadratic"), learning_rate=1e-3)
        fed.run(rounds=2)
        moved = {n: t + shift for n, t in fed.server.adapter.tensors.items() if not slot_of(n)}
        fed.server.adapter = fed.server.adapter.overlaid(moved)
        fed.round()
        feds.append({n: digest(t) for n, t in fed.store.get(2).items()})
    assert (feds[0] == feds[1]) == is_free


def test_feddpa_f_is_fedit_and_then_trains_copies_of_the_final_adapter() -> None:
    fed, base = Federation("feddpa-f", {"personal_rounds": 2}), Federation("fedit")
    for cohort in COHORTS[:4]:
        fed.round(cohort)
        base.round(cohort)
        same_everywhere(fed, base)
        assert fed.store.clients() == []
    rest = fed.server.adapter.digest()
    for number in range(2):
        assert list(fed.sampled(1)) == list(CLIENTS)
        kept = {cid: dict(fed.store.get(cid)) for cid in CLIENTS}
        done = fed.round()
        assert fed.server.adapter.digest() == rest
        for cid in CLIENTS:
            ((start, end),) = fits_of(done, cid)
            paths = {n: d for n, d in plain(fed.server.adapter).items() if n != HEAD}
            own = {in_slot(n, ""): digest(t) for n, t in kept[cid].items()}
            assert in_(LOCAL, start) == (own if number else paths)
            assert {start.scaling[m] for m in SHAPES} == {0.0}  # alone by default
            assert in_(LOCAL, end) != in_(LOCAL, start)
            assert digest(end[HEAD]) == digest(start[HEAD])


@pytest.mark.parametrize("name", ["feddpa-f", "feddpa-t"])
def test_a_view_of_feddpa_mixes_both_paths_by_instance(name: str) -> None:
    settings = {"strength": 0.4, "references": 3, "released_mix": True}
    fed = Federation(name, settings)
    for cohort in COHORTS[:5]:
        fed.round(cohort)
    late = 1  # of FedDPA-F's one personal round
    early = fed.server.view(late, {})
    assert early.mix is None
    assert early.adapter.digest() == fed.server.view().adapter.digest()
    assert not any(slot_of(n) for n in early.adapter)
    fed.round()
    view = fed.server.view(late, fed.store.get(late))
    assert view.mix == Mix("", LOCAL, 0.4, 3, is_flipped=True)
    assert {view.adapter.scaling[p] for p in view.adapter.modules} == {SCALING}
    assert {slot_of(p) for p in view.adapter.modules} == {"", LOCAL}
    for module in SHAPES:
        assert torch.equal(view.adapter[name_b(module)], fed.server.adapter[name_b(module)])


# pFedLoRA


@pytest.mark.parametrize("order", ["local-first", "global-first"])
def test_pfedlora_answers_as_it_was_trained(order: str) -> None:
    fed = Federation("pfedlora", {"mix": 0.3, "order": order})
    for cohort in COHORTS:
        done = fed.round(cohort)
        for request, _ in done.fits:
            assert {p: request.start.scaling[p] for p in request.start.modules} == {
                **dict.fromkeys(SHAPES, 0.7 * SCALING),
                **dict.fromkeys((f"{m}:local" for m in SHAPES), 0.3 * SCALING),
            }
        stages = [request.job.stage for request, _ in done.fits if request.job.cid == cohort[0]]
        assert stages == [LOCAL, ""] if order == "local-first" else ["", LOCAL]
    view = fed.server.view(2, fed.store.get(2))
    assert view.mix is None
    for m in SHAPES:
        local = view.adapter[name_b(f"{m}:local")] @ view.adapter[name_a(f"{m}:local")]
        common = fed.server.adapter[name_b(m)] @ fed.server.adapter[name_a(m)]
        assert_same({m: fed.client_view(2)[m]}, {m: SCALING * (0.7 * common + 0.3 * local)})
        assert_same({m: fed.global_view()[m]}, {m: SCALING * 0.7 * common})


def test_the_second_pass_of_pfedlora_sees_what_the_first_trained() -> None:
    fed = Federation("pfedlora", {"mix": 0.3}, learning_rate=0.1).run(rounds=2)
    fed.engine.mode, fed.steps = "quadratic", 1
    done = fed.round()
    module, cid = "layers.0.v_proj", 1
    (_, first), (start, last) = fits_of(done, cid)
    assert in_(LOCAL, start) == in_(LOCAL, first)
    gap = path_product(start, module) + path_product(start, f"{module}:local")
    gap = gap - noise(SHAPES[module], "target", cid, module)
    a, b = start[name_a(module)], start[name_b(module)]
    wanted = b - 0.1 * 0.7 * SCALING * gap @ a.T
    assert_same({"b": last[name_b(module)]}, {"b": wanted})


@pytest.mark.parametrize("name", ["pfedlora", "feddpa-t"])
def test_the_rank_of_the_local_adapter_changes_no_byte(name: str) -> None:
    moved = []
    for rank in (None, 1, 9):
        fed = Federation(name, {"local_rank": rank})
        sizes = []
        for cohort in COHORTS:
            done = fed.round(cohort)
            sizes += [
                (j.payload.nbytes, u.nbytes) for j, u in zip(done.jobs, done.updates, strict=True)
            ]
        moved.append(sizes)
        view = fed.server.view(0, fed.store.get(0)).adapter
        assert {view.rank_of(f"{m}:local") for m in SHAPES} == {rank or RANK}
        assert {view.rank_of(m) for m in SHAPES} == {RANK}
    assert moved[0] == moved[1] == moved[2]


# FedALT


def own_parts(update: Update) -> dict[str, Tensor]:
    """Return the own path that a client sent."""
    return {n: t for n, t in update.adapter.tensors.items() if not is_head(n)}


def test_the_rest_of_the_world_is_the_mean_of_what_all_others_sent_last() -> None:
    fed = Federation("fedalt")
    latest: dict[int, dict[str, Tensor]] = {}
    for cohort in COHORTS:
        done = fed.round(cohort)
        latest |= {update.cid: own_parts(update) for update in done.updates}
        for job in fed.jobs(CLIENTS):
            others = [sent for cid, sent in latest.items() if cid != job.cid]
            for name in others[0]:
                wanted = sum(sent[name] for sent in others) / len(others)
                rest = job.payload.adapter[in_slot(name, "rest")]
                assert_same({name: rest}, {name: torch.as_tensor(wanted)})


def test_the_rest_of_the_world_weighs_by_rows_if_asked() -> None:
    fed = Federation("fedalt", {"weights": "samples"})
    done = fed.round()
    name = name_a("h.0.c_attn")
    rows = {cid: n for cid, n in NUM_SAMPLES.items() if cid != 1}
    wanted = sum(
        own_parts(u)[name] * rows[u.cid] / sum(rows.values()) for u in done.updates if u.cid in rows
    )
    rest = fed.server.download(1).adapter[in_slot(name, "rest")]
    assert_same({name: rest}, {name: torch.as_tensor(wanted)})


def test_what_a_client_sends_does_not_come_back_to_it() -> None:
    fed = Federation("fedalt").run(rounds=2)
    done = fed.train(CLIENTS)
    received = []
    for factor in (1.0, -3.0):
        fork = fed.fork()
        updates = [
            replace(u, adapter=u.adapter.overlaid({n: t * factor for n, t in own_parts(u).items()}))
            if u.cid == 2
            else u
            for u in done.updates
        ]
        fork.finish(replace(done, updates=updates))
        received.append({cid: fork.server.download(cid).adapter for cid in CLIENTS})
    for name in received[0][2]:
        assert_same({name: received[1][2][name]}, {name: received[0][2][name]})
    name = name_b("h.0.c_attn:rest")
    assert float((received[1][0][name] - received[0][0][name]).norm()) > 1e-2


def test_one_client_alone_has_no_rest_of_the_world() -> None:
    fed = Federation("fedalt")
    for _ in range(4):
        done = fed.round([3])
        for module in SHAPES:
            assert not done.jobs[0].payload.adapter[name_b(f"{module}:rest")].any()
    assert not any(fed.client_view(3)[f"{m}:rest"].any() for m in SHAPES)
    assert all(fed.client_view(3)[m].any() for m in SHAPES)


def test_no_download_replaces_what_a_client_of_fedalt_keeps() -> None:
    fed = Federation("fedalt")
    kept: dict[int, dict[str, str]] = {}
    for cohort in COHORTS:
        done = fed.round(cohort)
        for cid in cohort:
            ((start, end),) = fits_of(done, cid)
            routers = {name_router(m) for m in SHAPES}
            paths = {name for m in SHAPES for name in (name_a(m), name_b(m))}
            if cid in kept:
                assert {n: digest(start[n]) for n in kept[cid]} == kept[cid]
            kept[cid] = {n: digest(end[n]) for n in routers | paths}
            assert set(fed.store.get(cid)) == routers | paths
            assert in_("rest", end) == in_("rest", start)
            sent = next(u for u in done.updates if u.cid == cid).adapter
            assert set(sent) == paths | {HEAD}
    assert sorted(kept) == list(CLIENTS)


def test_the_global_view_of_fedalt_is_the_plain_mean_of_all() -> None:
    fed = Federation("fedalt")
    done = fed.round()
    view = fed.server.view().adapter
    assert view.routing is None
    assert set(view) == {HEAD, *(n for m in SHAPES for n in (name_a(m), name_b(m)))}
    for name in own_parts(done.updates[0]):
        mean = torch.stack([u.adapter[name] for u in done.updates]).mean(dim=0)
        assert_same({name: view[name]}, {name: mean})


def test_fit_results_name_the_global_pass() -> None:
    fed = Federation("pfedlora", {"order": "global-first"})
    figures: list[FitResult] = []
    for request, result in fed.round().fits:
        if request.job.stage == "":
            figures.append(result)
    assert [dict(u.metrics) for u in fed.rounds[-1].updates] == [dict(f.metrics) for f in figures]
    assert {u.num_steps for u in fed.rounds[-1].updates} == {2 * fed.steps}


# all of them


@pytest.mark.parametrize(
    ("name", "settings", "until"),
    [
        ("fine-tune", {"tune_rounds": 3}, 3),
        ("ditto", {}, 6),
        ("feddpa-f", {"personal_rounds": 3}, 3),
        ("feddpa-t", {}, 6),
        ("pfedlora", {"mix": 0.25}, 6),
        ("local-only", {}, 0),
    ],
)
def test_the_aggregation_error_of_a_personal_method_is_that_of_its_shared_part(
    name: str, settings: dict[str, Any], until: int
) -> None:
    errors = []
    for fed in (Federation(name, settings), Federation("fedit")):
        errors.append([])
        for cohort in COHORTS:
            done = fed.round(cohort)
            parts = [Part(fed.server.weight(u), u) for u in done.updates]
            error = aggregation_error(fed.server, parts, {j.cid: j for j in done.jobs})
            assert error is not None
            errors[-1].append(error)
    weight = 1 - settings.get("mix", 0.0)
    assert errors[0][:until] == pytest.approx([weight * e for e in errors[1][:until]], abs=1e-9)
    assert max(errors[0][until:], default=0.0) < 1e-9  # nothing is shared, so nothing is lost


@pytest.mark.parametrize("name", ["fedlease", "fedalt"])
def test_methods_without_a_mean_report_no_aggregation_error(name: str) -> None:
    fed = Federation(name)
    done = fed.round()
    parts = [Part(1.0, u) for u in done.updates]
    assert aggregation_error(fed.server, parts, {j.cid: j for j in done.jobs}) is None


@pytest.mark.parametrize("name", ["local-only", "fedlease", "hilora", "fedalt"])
def test_methods_without_common_coordinates_say_why(name: str) -> None:
    why = server_class(name).recoordinated
    assert why.startswith(("its ", "a client"))
    assert not why.endswith(".")
