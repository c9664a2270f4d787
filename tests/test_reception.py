"""What the loop and whole runs make of bad updates, of robust rules, and of clients' privacy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.setups import SETUPS, Setup
from conformance.world import CLIENTS, Federation
from loop_worlds import Slow, fate, loop_of, told
from small_runs import Silent, final_digests, records, small_config, write_questions
from test_simulation_state import Stopped, StoppingQueue, through_files

from fedllm.adapters import Adapter, is_b, wire
from fedllm.adapters.peft_format import load_peft
from fedllm.config import Config
from fedllm.engine import CohortEngine
from fedllm.errors import TrainingError
from fedllm.experiment import make_config
from fedllm.experiment import run as run_module
from fedllm.experiment.exchange import reception_of
from fedllm.experiment.run import resume, run
from fedllm.federation import FitRequest, FitResult, Job, Progress, Update
from fedllm.federation.privacy import ClientPrivacy
from fedllm.federation.robust import Krum, Mean, Median, NormBound, Robust, TrimmedMean
from fedllm.federation.transport import Transport
from fedllm.results import RunDir, overview, plots
from fedllm.simulation import Loop, Reception

Spoil = Callable[[Update], Update]
BAD = 2


def with_tensor(update: Update, change: Callable[[torch.Tensor], torch.Tensor]) -> Update:
    """Change the first tensor of an update."""
    name = next(iter(update.adapter))
    return replace(update, adapter=update.adapter.overlaid({name: change(update.adapter[name])}))


def renamed(update: Update) -> Update:
    tensors = {n.replace("q_proj", "z_proj"): t for n, t in update.adapter.tensors.items()}
    return replace(update, adapter=Adapter(tensors))


def incomplete(update: Update) -> Update:
    _, *names = update.adapter
    return replace(update, adapter=update.adapter.select(names.__contains__))


FAULTS: dict[str, tuple[Spoil, str]] = {
    "nan": (lambda u: with_tensor(u, lambda t: t.log()), "not finite"),
    "infinite": (lambda u: with_tensor(u, lambda t: t / 0), "not finite"),
    "shape": (lambda u: with_tensor(u, lambda t: t[:, :-1]), "of shape"),
    "dtype": (lambda u: with_tensor(u, lambda t: t.half()), "as float16"),
    "name": (renamed, "unexpected tensors"),
    "missing": (incomplete, "did not send expected"),
    "norm": (lambda u: with_tensor(u, lambda t: t * 1e9), "change of norm"),
    "rows": (lambda u: replace(u, num_samples=10**6), "training rows"),
    "loss": (lambda u: replace(u, metrics={"loss": math.nan}), "a loss of nan"),
    "sender": (lambda u: replace(u, cid=0), "answered the job of client 2"),
}
each_fault = pytest.mark.parametrize("fault", list(FAULTS))


def spoiling(loop: Loop, spoil: Spoil, bad: Sequence[int] = (BAD,), since: int = 0) -> Loop:
    """Spoil what some clients send, from a version on."""
    inner = loop.executor.run  # type: ignore[attr-defined]

    def spoilt(jobs: Sequence[Job]) -> Any:
        return [
            spoil(update) if job.cid in bad and job.version >= since else update
            for job, update in zip(jobs, inner(jobs), strict=True)
        ]

    loop.executor.run = spoilt  # type: ignore[method-assign]
    return loop


# bad updates in the loop


@each_fault
@pytest.mark.parametrize("name", ["fedit", "fedsa-lora", "scaffold"])
def test_a_bad_update_is_as_if_its_client_had_not_been_asked(
    name: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, reason = FAULTS[fault]
    fed, others = Federation(name), Federation(name)
    loop = loop_of(fed, reception=Reception(max_norm=1e6))
    made = [*spoiling(loop, spoil, since=1).run(3)]
    others.round()
    before = others.store.get(BAD)
    for _ in range(2):
        # the control variate counts the bad client as one that sent nothing
        others.round([cid for cid in CLIENTS if cid != BAD])
    assert [[row["client"] for row in r.rejected] for r in made] == [[], [BAD], [BAD]]
    assert all(reason in row["reason"] for r in made for row in r.rejected)
    assert [u.cid for u in made[1].updates] == [cid for cid in CLIENTS if cid != BAD]
    for tensor_name, tensor in others.server.adapter.tensors.items():
        torch.testing.assert_close(fed.server.adapter[tensor_name], tensor, atol=0, rtol=1e-12)
    kept = fed.store.get(BAD)
    assert set(kept) == set(before)
    assert all(torch.equal(kept[n], before[n]) for n in kept)
    assert [r.message for r in caplog.records] == [
        f"round {number}: rejected: {made[number - 1].rejected[0]['reason']}" for number in (2, 3)
    ]


def test_a_bad_update_has_been_sent_all_the_same() -> None:
    spoil, _ = FAULTS["nan"]
    for made in spoiling(loop_of(Federation("fedit"), world=Slow()), spoil).run(2):
        assert [row["client"] for row in made.ledger] == list(CLIENTS)
        assert len({row["up_bytes"] for row in made.ledger}) == 1
        assert made.ledger[0]["up_bytes"] > 0


def test_what_is_owed_of_a_rejected_update_stays_owed() -> None:
    fed = Federation("fedit")
    packed = Reception(Transport(uplink=wire.make("topk", share=0.5)))
    loop = spoiling(loop_of(fed, reception=packed), FAULTS["nan"][0], since=2)
    rounds = loop.run(3)
    next(rounds), next(rounds)
    before = dict(fed.store.get(BAD))
    assert before
    last = next(rounds)
    assert [row["client"] for row in last.rejected] == [BAD]
    after = fed.store.get(BAD)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert all(bool(t.isfinite().all()) for t in after.values())


def test_rejections_are_counted_by_client_whenever_they_come() -> None:
    loop = spoiling(loop_of(Federation("fedit"), world=Slow({1: 50.0})), FAULTS["nan"][0], (3, 1))
    made = next(loop.run(1))
    assert [row["client"] for row in made.rejected] == [1, 3]
    assert [update.cid for update in made.updates] == [0, 2]


def test_when_nothing_is_left_the_error_names_clients_and_remedies() -> None:
    loop = spoiling(loop_of(Federation("fedit")), FAULTS["nan"][0], CLIENTS)
    with pytest.raises(TrainingError) as told_:
        list(loop.run(1))
    for part in ("client 0", "client 1", "client 2", "and 1 more", "learning_rate", "max_norm"):
        assert part in str(told_.value)


# robust rules and privacy, whatever the algorithm

RULES: dict[str, Robust] = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(0.3),
    "multi-krum": Krum(byzantine=0, keep=2),
    "norm-bound": NormBound(1.0),
}
DEFINED = [s for s in SETUPS if not s.mixed and not s.start().server.recoordinated]
each_defined = pytest.mark.parametrize("setup", DEFINED, ids=str)


def are_alike(setup: Setup) -> bool:
    """Tell whether all clients send the same tensors."""
    return len({tuple(u.adapter) for u in setup.start().train(CLIENTS).updates}) == 1


@each_defined
@pytest.mark.parametrize("rule", list(RULES))
def test_a_rule_works_with_every_algorithm_it_is_defined_for(setup: Setup, rule: str) -> None:
    fed = setup.start()
    loop = loop_of(fed, reception=Reception(robust=RULES[rule]))
    if rule == "multi-krum" and len(fed.sampled(4)) < 4:
        with pytest.raises(TrainingError, match="at least 4 updates and got 1"):
            list(loop.run(1))
    elif rule == "multi-krum" and not are_alike(setup):
        with pytest.raises(TrainingError, match=r"not defined .*different tensors"):
            list(loop.run(1))
    else:
        assert [made.number for made in loop.run(6)] == [1, 2, 3, 4, 5, 6]
        assert all(bool(t.isfinite().all()) for t in fed.server.adapter.tensors.values())


@each_defined
@pytest.mark.parametrize("cohort", [2, 4])
def test_privacy_works_through_every_stage_and_cohort(setup: Setup, cohort: int) -> None:
    # some stages ask everyone, and cyclic transfer one client at a time
    fed = setup.start()
    loop = loop_of(fed, cohort, reception=Reception(privacy=ClientPrivacy(1.0, 0.5, 1e-5, seed=3)))
    if not are_alike(setup):
        with pytest.raises(TrainingError, match=r"updates.privacy is not defined .*different"):
            list(loop.run(6))
        return
    start = {n: t.clone() for n, t in fed.server.adapter.tensors.items()}
    assert [made.number for made in loop.run(6)] == [1, 2, 3, 4, 5, 6]
    moved = [n for n, t in start.items() if not torch.equal(fed.server.adapter[n], t)]
    assert moved


def test_privacy_divides_by_those_who_were_asked() -> None:
    # cyclic transfer asks one client, so its whole clipped change counts
    fed = Federation("cyclic")
    start = fed.server.adapter
    loop = loop_of(
        fed, cohort_size=4, reception=Reception(privacy=ClientPrivacy(1e-3, 0.0, 1e-5, seed=3))
    )
    next(loop.run(1))
    moved = [(fed.server.adapter[n] - start[n]).flatten() for n in start]
    assert float(torch.cat(moved).norm()) == pytest.approx(1e-3)


def test_privacy_counts_a_rejected_client_as_no_change() -> None:
    fed = Federation("fedit")
    start = fed.server.adapter
    private = Reception(privacy=ClientPrivacy(1e-3, 0.0, 1e-5, seed=3))
    loop = spoiling(loop_of(fed, reception=private), FAULTS["nan"][0], (0, 1, 2))
    next(loop.run(1))
    moved = [(fed.server.adapter[n] - start[n]).flatten() for n in start]
    assert float(torch.cat(moved).norm()) == pytest.approx(1e-3 / len(CLIENTS))


@pytest.mark.parametrize("name", ["ffa-lora", "fedsa-lora"])
def test_a_private_loop_with_rejections_goes_on_wherever_it_was_stopped(name: str) -> None:
    def build(queue: StoppingQueue | None = None) -> Loop:
        fed = Federation(name)
        loop = loop_of(
            fed,
            3,
            Slow({0: 3.0, 1: 30.0}),
            queue,
            reception=Reception(
                Transport(uplink=wire.make("int8")), privacy=ClientPrivacy(1.0, 0.5, 1e-5, seed=9)
            ),
        )
        return spoiling(loop, FAULTS["nan"][0])

    counting = StoppingQueue()
    whole = build(counting)
    rounds = list(whole.run(3))
    assert any(made.rejected for made in rounds)
    total = counting.events - counting.left
    assert total >= 2 * sum(len(made.updates) for made in rounds)
    for stop in range(total):
        first, made = build(StoppingQueue(stop)), []
        with pytest.raises(Stopped):
            made += first.run(3)
        second = build()
        second.restore(through_files(first.state()))  # type: ignore[arg-type]
        made += second.run(3)
        assert told(made) == told(rounds)
        assert [r.rejected for r in made] == [r.rejected for r in rounds]
        assert [r.agg_error for r in made] == [r.agg_error for r in rounds]
        assert fate(second) == fate(whole)


# the configuration


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ({}, Reception()),
        ({"max_norm": 3.0}, Reception(max_norm=3.0)),
        ({"robust": "mean"}, Reception(robust=Mean())),
        ({"robust": "median"}, Reception(robust=Median())),
        (
            {"robust": {"name": "trimmed-mean", "share": 0.2}},
            Reception(robust=TrimmedMean(0.2)),
        ),
        ({"robust": {"name": "krum", "byzantine": 1}}, Reception(robust=Krum(1))),
        (
            {"robust": {"name": "multi-krum", "byzantine": 2, "keep": 3}},
            Reception(robust=Krum(2, 3)),
        ),
        ({"robust": {"name": "norm-bound", "bound": 2.0}}, Reception(robust=NormBound(2.0))),
    ],
)
def test_the_configuration_says_what_is_done_to_updates(
    updates: dict[str, Any], expected: Reception
) -> None:
    assert reception_of(make_config({"updates": updates})) == expected


def test_the_noise_follows_from_the_runs_seed() -> None:
    tree = {"updates": {"privacy": {"clip": 2.0, "noise_multiplier": 0.7}}}
    one, two = (reception_of(make_config({**tree, "seed": seed})).privacy for seed in (1, 2))
    assert one is not None
    assert two is not None
    assert (one.clip, one.noise_multiplier, one.delta) == (2.0, 0.7, 1e-5)
    assert one.seed != two.seed
    assert reception_of(make_config({**tree, "seed": 1})).privacy == one


# whole runs


@pytest.fixture(scope="module")
def configure(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("received")
    data = write_questions(folder / "questions.jsonl")
    words = ("federation.cohort_size=3", "evaluation.metrics=[loss]")
    return lambda *more: small_config(folder, tiny_model("llama"), data, *words, *more)


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "plot_run", lambda directory: [])


def poison(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have client 1 of every run train to something else."""
    real = CohortEngine.train

    def train(
        self: CohortEngine, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        found = real(self, requests, progress)
        return [
            replace(f, adapter=f.adapter.overlaid({n: change(f.adapter[n]) for n in f.adapter}))
            if request.job.cid == 1
            else f
            for request, f in zip(requests, found, strict=True)
        ]

    monkeypatch.setattr(CohortEngine, "train", train)


def final_norm(path: Path) -> float:
    """Return the norm of all B of the last adapter; they start from 0."""
    adapter = load_peft(path / "checkpoints" / "2" / "adapter")
    return math.hypot(*(float(adapter[name].norm()) for name in adapter if is_b(name)))


def test_a_runs_records_name_whom_it_rejected(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda tensor: tensor * math.nan)
    path = run(configure("name=rejecting"), Silent()).path
    found = RunDir.open(path).read("metrics")
    for record in found[1:]:
        (row,) = record["rejected"]
        assert row["client"] == 1
        assert "not finite" in row["reason"]
        assert [client["client"] for client in record["train"]["clients"]] == [0, 2]
        assert record["agg_error"] >= 0
    assert overview(RunDir.open(path)).rejected == 2
    assert (path / "log.txt").read_text().count("rejected: client 1") == 2


def test_the_median_of_a_run_withstands_whom_its_mean_follows(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = final_norm(run(configure("name=clean"), Silent()).path)
    poison(monkeypatch, lambda tensor: tensor * 1e6)
    mean = final_norm(run(configure("name=mean"), Silent()).path)
    words = ("name=median", "updates.robust=median")
    median = final_norm(run(configure(*words), Silent()).path)
    assert 0 < median < 2 * clean < mean / 1e3


PRIVATE = ("algorithm=ffa-lora", "updates.privacy={clip: 1.0, noise_multiplier: 0.3}")


class Interrupted(BaseException):
    """The process ends here."""


def test_a_private_run_can_be_had_again_and_gone_on_with(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    words = (*PRIVATE, "federation.rounds=3", "communication.uplink=int8")
    whole = run(configure("name=private", *words), Silent()).path
    again = run(configure("name=again", *words), Silent()).path
    assert (records(again), final_digests(again)) == (records(whole), final_digests(whole))
    config, real, left = configure("name=stopped", *words), run_module.save_checkpoint, [1]

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if not left:
            raise Interrupted
        left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "save_checkpoint", breaking)
    with pytest.raises(Interrupted):
        run(config, Silent())
    monkeypatch.setattr(run_module, "save_checkpoint", real)
    stopped = resume(config.run_dir, Silent()).path
    assert (records(stopped), final_digests(stopped)) == (records(whole), final_digests(whole))
    other = run(configure("name=other", *words, "seed=1"), Silent()).path
    assert final_digests(other) != final_digests(whole)


def test_a_private_runs_records_tell_what_may_be_claimed(
    configure: Callable[..., Config],
) -> None:
    pytest.importorskip("dp_accounting")
    path = run(configure("name=claims", *PRIVATE), Silent()).path
    start, *rounds = RunDir.open(path).read("metrics")
    assert "privacy" not in start
    values = [record["privacy"]["value"] for record in rounds]
    assert 0 < values[0] < values[1]
    for record in rounds:
        told_ = record["privacy"]
        assert (told_["delta"], told_["adjacency"]) == (1e-5, "one client's data replaced")
        assert told_["reason"]
    words = ("name=turns", *PRIVATE[1:], "algorithm=cyclic")
    turns = RunDir.open(run(configure(*words), Silent()).path).read("metrics")[-1]["privacy"]
    assert turns["value"] is None
    assert "turns" in turns["reason"]
    assert json.loads(json.dumps(turns)) == turns
