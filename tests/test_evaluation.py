"""Evaluation of global and personal views, on a scorer whose numbers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.adapters import Adapter, initial, slot_of
from fedllm.config import EvaluationConfig
from fedllm.data import Partition, TokenSet
from fedllm.errors import ConfigError
from fedllm.evaluation import BY_TASK, METRICS, Evaluation, Evaluator
from fedllm.federation import BaseServer, MemoryStore, Mix, Payload, Scores, View
from fedllm.system import RankRule

NUM_CLIENTS = 4
SIZES = (3, 0, 5, 2)
ROWS = sum(SIZES)


def token_set(labels: np.ndarray | None = None, names: Sequence[str] = ()) -> TokenSet:
    references = tuple(f"answer {i}" for i in range(ROWS))
    if labels is not None:
        references = tuple(names[i] for i in labels)
    return TokenSet(
        tokens=np.zeros(ROWS, np.int32),
        supervised=np.ones(ROWS, bool),
        offsets=np.arange(ROWS + 1),
        prompt_lengths=np.ones(ROWS, np.int32),
        labels=labels,
        groups=None,
        references=references,
    )


def partition() -> Partition:
    """Give client 0 every row that ends up first in a shuffled order, and so on."""
    order = np.random.default_rng(2).permutation(ROWS)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    rows = np.concatenate([np.sort(part) for part in np.split(order, offsets[1:-1])])
    train = np.arange(NUM_CLIENTS + 1)
    return Partition(np.arange(NUM_CLIENTS), train, rows.astype(np.int32), offsets)


@dataclass
class FakeScorer:
    """A model whose loss on row i is i + 1 plus the first number of its view's head."""

    says: dict[int, str] = field(default_factory=dict)
    choice: np.ndarray = field(default_factory=lambda: np.zeros(ROWS, int))
    scored: list[list[View]] = field(default_factory=list)
    generated: list[list[View]] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)

    def score(self, views: Sequence[View], tokens: TokenSet) -> Scores:
        self.scored.append(list(views))
        scores = replace(Scores.empty(len(tokens)), choice=self.choice)
        for view in views:
            scores.loss_sum[view.rows] = view.rows + 1 + float(view.adapter["head.weight"][0])
            scores.count[view.rows] = 1
            scores.correct[view.rows] = view.rows % 2
        return scores

    def generate(
        self,
        views: Sequence[View],
        tokens: TokenSet,
        *,
        max_new_tokens: int,
        batch_size: int,
        progress: Any = None,
    ) -> dict[int, str]:
        self.generated.append(list(views))
        self.asked = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        if progress is not None:
            progress(3)
        rows = np.concatenate([view.rows for view in views]).tolist()
        return {row: self.says.get(row, f"answer {row}") for row in rows}


def evaluator(scorer: FakeScorer | None = None, **changes: Any) -> Evaluator:
    settings = {
        "scorer": scorer or FakeScorer(),
        "tokens": token_set(),
        "partition": partition(),
        "task": "qa",
        "kind": "causal-lm",
        "label_names": (),
        "config": EvaluationConfig(metrics=["loss", "token_accuracy"]),
        "seed": 0,
    }
    return Evaluator(**settings | changes)


def server(head: float = 0.0) -> BaseServer:
    made = BaseServer()
    adapter = initial({"q": (4, 3)}, 2, 1.0, 0, {"head.weight": torch.tensor([head, 0.0])})
    made.start(adapter, RankRule((2,)), "local")
    return made


def run(
    found: Evaluator, *scopes: str, store: MemoryStore | None = None, sample: bool = False
) -> Evaluation:
    return found.evaluate(server(), store or MemoryStore(), scopes, sample=sample)


def test_the_global_view_is_one_sweep_over_all_rows() -> None:
    scorer = FakeScorer()
    record = run(evaluator(scorer), "global").record
    ((view,),) = scorer.scored
    assert view.rows.tolist() == list(range(ROWS))
    assert scorer.generated == []
    assert record["global"] == {"loss": np.mean(np.arange(ROWS) + 1), "token_accuracy": 0.5}
    assert set(record) == {"global", "clients"}


def test_each_clients_figures_come_from_its_own_rows_alone() -> None:
    parts = partition()
    by_client = run(evaluator(), "global").record["clients"]["by_client"]
    assert list(by_client) == ["0", "2", "3"]
    for cid, metrics in by_client.items():
        rows = parts.test(int(cid))
        assert metrics == {
            "loss": pytest.approx(np.mean(rows + 1)),
            "token_accuracy": pytest.approx(np.mean(rows % 2)),
        }


def test_the_mean_is_over_clients_and_not_over_rows() -> None:
    record = run(evaluator(), "global").record["clients"]
    for name in ("loss", "token_accuracy"):
        values = [metrics[name] for metrics in record["by_client"].values()]
        assert record["mean"][name] == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ("clients", "few"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (30, 3), (70, 7), (71, 8)]
)
def test_the_worst_tenth_is_the_tenth_with_the_worst_values(clients: int, few: int) -> None:
    order = np.random.default_rng(clients).permutation(clients).astype(np.int32)
    offsets = np.arange(clients + 1)
    tokens = replace(
        token_set(),
        prompt_lengths=np.ones(clients, np.int32),
        references=("",) * clients,
    )

    class Graded(FakeScorer):
        def score(self, views: Sequence[View], tokens: TokenSet) -> Scores:
            scores = Scores.empty(clients)
            scores.loss_sum[:], scores.count[:] = np.arange(clients), 1000
            scores.correct[:] = np.arange(clients)
            return scores

    split = Partition(order, offsets, order, offsets)
    record = run(evaluator(Graded(), tokens=tokens, partition=split), "global").record
    best, worst = np.arange(clients - few, clients), np.arange(few)
    assert record["clients"]["worst_10"] == {
        "loss": pytest.approx(best.mean() / 1000),
        "token_accuracy": pytest.approx(worst.mean() / 1000),
    }


def test_personal_views_carry_the_clients_own_tensors_and_are_one_sweep() -> None:
    own = {2: {"head.weight": torch.tensor([50.0, 0.0])}}
    scorer = FakeScorer()
    record = run(evaluator(scorer), "personal", store=MemoryStore(own)).record
    (views,) = scorer.scored
    parts = partition()
    assert [view.rows.tolist() for view in views] == [parts.test(c).tolist() for c in (0, 2, 3)]
    heads = [float(view.adapter["head.weight"][0]) for view in views]
    assert heads == [0.0, 50.0, 0.0]
    assert set(record) == {"personal"}
    by_client = record["personal"]["by_client"]
    assert by_client["2"]["loss"] == pytest.approx(np.mean(parts.test(2) + 51))
    assert by_client["0"]["loss"] == pytest.approx(np.mean(parts.test(0) + 1))
    losses = np.arange(ROWS) + 1.0
    losses[parts.test(2)] += 50
    assert record["personal"]["overall"]["loss"] == pytest.approx(losses.mean())


def test_a_clients_own_tensors_do_not_touch_the_global_view() -> None:
    own = MemoryStore({0: {"head.weight": torch.tensor([50.0, 0.0])}})
    both = run(evaluator(), "global", "personal", store=own).record
    assert set(both) == {"global", "clients", "personal"}
    assert both["global"] == run(evaluator(), "global").record["global"]
    assert both["personal"]["overall"]["loss"] > both["global"]["loss"]


def test_a_sample_has_the_asked_for_size_and_is_the_same_each_time() -> None:
    config = EvaluationConfig(metrics=["loss"], max_rows=6)
    scorer = FakeScorer()
    found = evaluator(scorer, config=config)
    for _ in range(2):
        run(found, "global", "personal", sample=True)
    run(evaluator(scorer, config=config, seed=0), "global", sample=True)
    rows = [
        sorted(np.concatenate([view.rows for view in views]).tolist()) for views in scorer.scored
    ]
    assert len(rows[0]) == 6
    assert all(other == rows[0] for other in rows)
    others = FakeScorer()
    for seed in range(1, 6):
        run(evaluator(others, config=config, seed=seed), "global", sample=True)
    assert any(views[0].rows.tolist() != rows[0] for views in others.scored)


def test_all_rows_are_used_without_a_sample_or_where_it_would_be_larger() -> None:
    small = EvaluationConfig(metrics=["loss"], max_rows=3)
    large = EvaluationConfig(metrics=["loss"], max_rows=ROWS)
    for config, sample in ((small, False), (large, True)):
        scorer = FakeScorer()
        run(evaluator(scorer, config=config), "global", sample=sample)
        assert len(scorer.scored[0][0].rows) == ROWS


def test_answers_are_generated_only_for_metrics_that_need_them() -> None:
    scorer = FakeScorer({4: "something else"})
    config = EvaluationConfig(metrics=["exact_match", "loss"], max_new_tokens=9, batch_size=5)
    told = []
    found = evaluator(scorer, config=config).evaluate(
        server(), MemoryStore(), ["global"], sample=False, progress=told.append
    )
    assert scorer.asked == {"max_new_tokens": 9, "batch_size": 5}
    assert told == [3]
    assert found.record["global"]["exact_match"] == pytest.approx((ROWS - 1) / ROWS)
    lines = {line["row"]: line for line in found.predictions}
    owner = {row: c for c in range(NUM_CLIENTS) for row in partition().test(c).tolist()}
    assert {row: line["client"] for row, line in lines.items()} == owner
    assert lines[4] == {
        "row": 4,
        "client": owner[4],
        "view": "global",
        "reference": "answer 4",
        "prediction": "something else",
        "is_right": False,
    }
    assert sum(line["is_right"] for line in lines.values()) == ROWS - 1


def test_a_classifiers_choices_are_measured_and_told_by_name() -> None:
    labels = np.arange(ROWS) % 2
    choice = labels.copy()
    choice[3] = 1 - choice[3]
    found = run(
        evaluator(
            FakeScorer(choice=choice),
            tokens=token_set(labels, ("bad", "good")),
            task="classification",
            kind="sequence-classification",
            label_names=("bad", "good"),
            config=EvaluationConfig(metrics="auto"),
        ),
        "global",
    )
    assert list(found.record["global"]) == ["accuracy", "macro_f1", "loss"]
    assert found.record["global"]["accuracy"] == 0.9
    wrong = [line for line in found.predictions if not line["is_right"]]
    assert [(w["row"], w["prediction"], w["reference"]) for w in wrong] == [(3, "bad", "good")]


def test_a_language_model_classifies_by_what_it_writes() -> None:
    labels = np.arange(ROWS) % 2
    says = {i: ("bad", "good")[label] for i, label in enumerate(labels)}
    says |= {0: " BAD ", 1: "nothing", 2: "bad."}
    scorer = FakeScorer(says)
    found = run(
        evaluator(
            scorer,
            tokens=token_set(labels, ("bad", "good")),
            task="classification",
            label_names=("bad", "good"),
            config=EvaluationConfig(metrics="auto"),
        ),
        "global",
    )
    assert len(scorer.generated) == 1
    right = [line["is_right"] for line in found.predictions]
    assert found.record["global"]["accuracy"] == pytest.approx(np.mean(right))
    assert not right[1]
    assert right[0]


# which metrics


def test_an_unknown_metric_is_refused_with_a_suggestion() -> None:
    config = EvaluationConfig(metrics=["los", "exact_match", "f7"])
    with pytest.raises(ConfigError, match="Did you mean 'loss'") as caught:
        evaluator(config=config)
    assert len(caught.value.problems) == 2
    assert all(line.startswith("evaluation.metrics: ") for line in caught.value.problems)


@pytest.mark.parametrize(
    ("metric", "task", "kind"),
    [
        ("accuracy", "qa", "causal-lm"),
        ("macro_f1", "math", "causal-lm"),
        ("exact_match", "classification", "sequence-classification"),
        ("final_number", "classification", "sequence-classification"),
    ],
)
def test_a_metric_that_cannot_be_computed_is_refused(metric: str, task: str, kind: str) -> None:
    config = EvaluationConfig(metrics=["loss", metric])
    with pytest.raises(ConfigError, match=f"'{metric}' does not fit task '{task}'"):
        evaluator(config=config, task=task, kind=kind)


@pytest.mark.parametrize("task", list(BY_TASK))
def test_the_metrics_chosen_by_themselves_exist_and_fit(task: str) -> None:
    kinds = ["causal-lm"] + ["sequence-classification"] * (task == "classification")
    for kind in kinds:
        found = evaluator(config=EvaluationConfig(), task=task, kind=kind)
        assert found.names == BY_TASK[task]
        assert set(found.names) <= set(METRICS)


def test_an_adapter_of_the_server_is_not_changed_by_evaluation() -> None:
    made = server()
    before = made.adapter.digest()
    own = MemoryStore({0: {"head.weight": torch.tensor([50.0, 0.0])}})
    evaluator().evaluate(made, own, ["global", "personal"], sample=False)
    assert made.adapter.digest() == before
    assert isinstance(made.adapter, Adapter)


def test_a_language_model_that_was_not_asked_for_a_class_predicts_none() -> None:
    labels = np.arange(ROWS) % 2
    scorer = FakeScorer()
    found = run(
        evaluator(
            scorer,
            tokens=token_set(labels, ("bad", "good")),
            task="classification",
            label_names=("bad", "good"),
            config=EvaluationConfig(metrics=["loss"]),
        ),
        "global",
    )
    assert scorer.generated == []
    assert found.predictions == []


# views that are mixed by instance


@dataclass
class ComparingScorer(FakeScorer):
    """Finds row i as like a client's own as `alike[i]`."""

    alike: np.ndarray = field(default_factory=lambda: np.linspace(-1.0, 1.0, ROWS))
    compared: list[tuple[list[View], list[int], int, int]] = field(default_factory=list)

    def similarity(
        self,
        views: Sequence[View],
        cids: Sequence[int],
        tokens: TokenSet,
        *,
        references: int,
        seed: int,
    ) -> list[np.ndarray]:
        self.compared.append((list(views), list(cids), references, seed))
        return [self.alike[view.rows] for view in views]


@dataclass(kw_only=True)
class MixingServer(BaseServer):
    """Gives each client a path of its own beside the common one, and says how to mix them."""

    mix: Mix | None = None
    without: tuple[int, ...] = ()
    """Clients that have only the common path yet."""

    def view(self, cid: int | None = None, state: Any = None) -> Payload:
        if cid is None or cid in self.without:
            return super().view()
        local = self.adapter.body.moved("local")
        return Payload(self.version, self.adapter.joined(local), mix=self.mix)


def mixing(mix: Mix, scorer: ComparingScorer, without: tuple[int, ...] = ()) -> list[View]:
    """Evaluate with a mix and return the views that were scored."""
    made = MixingServer(mix=mix, without=without)
    start = initial({"q": (4, 3)}, 2, 1.0, 0, {"head.weight": torch.zeros(2)})
    made.start(start, RankRule((2,)), "local")
    evaluator(scorer, seed=8).evaluate(made, MemoryStore(), ("personal",), sample=False)
    return scorer.scored[-1]


@pytest.mark.parametrize("is_flipped", [False, True])
def test_each_row_weighs_the_local_path_by_how_like_the_clients_own_it_is(
    is_flipped: bool,
) -> None:
    scorer = ComparingScorer()
    for view in mixing(Mix("", "local", 0.5, 3, is_flipped), scorer):
        share = np.array([max(0.5 * scorer.alike[row], 0.0) for row in view.rows])
        local, common = (1 - share, share) if is_flipped else (share, 1 - share)
        assert set(view.mix) == {"", "local"}
        assert np.allclose(view.mix["local"], local)
        assert np.allclose(view.mix[""], common)


def test_weights_stay_between_nothing_and_one() -> None:
    scorer = ComparingScorer(alike=np.linspace(-3.0, 3.0, ROWS))
    views = mixing(Mix("", "local", 1.0, 3), scorer)
    weights = np.concatenate([view.mix["local"] for view in views])
    assert {0.0, 1.0} <= set(weights)
    assert ((weights >= 0) & (weights <= 1)).all()


def test_rows_are_compared_under_the_local_path_alone() -> None:
    scorer = ComparingScorer()
    scored = mixing(Mix("", "local", 1.0, 5), scorer)
    ((views, cids, references, seed),) = scorer.compared
    assert cids == [cid for cid, size in enumerate(SIZES) if size]
    assert (references, seed) == (5, 8)
    for alone, view in zip(views, scored, strict=True):
        assert np.array_equal(alone.rows, view.rows)
        assert {slot_of(name) for name in alone.adapter.modules} == {"local"}
        assert "head.weight" in alone.adapter
        assert {slot_of(name) for name in view.adapter.modules} == {"", "local"}


def test_who_has_nothing_to_mix_is_not_compared() -> None:
    scorer = ComparingScorer()
    scored = mixing(Mix("", "local", 1.0, 5), scorer, without=(0, 3))
    ((views, cids, _, _),) = scorer.compared
    assert cids == [2]
    assert [len(view.rows) for view in views] == [SIZES[2]]
    assert [bool(view.mix) for view in scored] == [False, True, False]
    assert np.allclose(scored[1].mix["local"], np.maximum(scorer.alike[scored[1].rows], 0))


def test_views_that_ask_for_no_mix_are_scored_as_they_are() -> None:
    scorer = ComparingScorer()
    run(evaluator(scorer), "global", "personal")
    assert scorer.compared == []
    assert all(not view.mix for views in scorer.scored for view in views)
    made = MixingServer(mix=Mix("", "local", 1.0, 3))
    start = initial({"q": (4, 3)}, 2, 1.0, 0, {"head.weight": torch.zeros(2)})
    made.start(start, RankRule((2,)), "local")
    evaluator(scorer).evaluate(made, MemoryStore(), ("global",), sample=False)
    assert scorer.compared == []
