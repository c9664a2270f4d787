"""Evaluation of a federation's views: the global model, and each client's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from fedllm.adapters import is_head, slot_of
from fedllm.config import EvaluationConfig
from fedllm.data import Partition, TokenSet
from fedllm.errors import ConfigError, unknown
from fedllm.evaluation.classes import ClassFigures, classification_report
from fedllm.evaluation.metrics import BY_TASK, METRICS, Evidence, Need, bleu
from fedllm.federation import Mix, Payload, Scorer, StateStore, View
from fedllm.seeding import rng

Scope = Literal["global", "personal"]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    record: Mapping[str, Any]
    """`global` (metrics), `clients` (mean, worst 10 %, each) and `personal`, as asked for; with
    BLEU `signatures`, which says how sacrebleu counts."""
    predictions: Sequence[Mapping[str, Any]]
    """A line for each answered or classified row."""
    reports: Mapping[Scope, Mapping[str, ClassFigures]] = field(default_factory=dict)
    """For each view of a classification task: the figures of every class."""


class Views(Protocol):
    """What hands out the models to evaluate; a server is one."""

    def view(self, cid: int | None = None, state: Any = None) -> Payload:
        """Return the global view, or a client's."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates on one test set.

    Cost: the global view is one sweep over the test rows however many clients there are, and each
    client's figures are sums over its own rows; personal views are a cohort, one sweep too.
    """

    scorer: Scorer
    tokens: TokenSet
    partition: Partition
    task: str
    kind: str
    label_names: Sequence[str]
    config: EvaluationConfig
    seed: int
    prompts: Sequence[str] = ()
    """What each test row asks, for the predictions file."""

    def __post_init__(self) -> None:
        wrong = [unknown("metric", n, METRICS) for n in self.names if n not in METRICS]
        unfit = [n for n in self.names if n in METRICS and not self._fits(METRICS[n].needs)]
        wrong += [f"metric '{n}' does not fit task '{self.task}' on a {self.kind}" for n in unfit]
        if wrong:
            raise ConfigError([f"evaluation.metrics: {line}" for line in wrong])

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that are computed; the first is the main one."""
        if self.config.metrics == "auto":
            return BY_TASK[self.task]
        return tuple(self.config.metrics)

    def evaluate(
        self,
        server: Views,
        store: StateStore,
        scopes: Iterable[Scope],
        *,
        sample: bool,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Evaluate the views of the present state.

        Args:
            server: Not modified.
            store: The clients' private tensors.
            scopes: Which views.
            sample: Whether at most `evaluation.max_rows` rows are used.
            progress: Called with the number of answers generated so far.
        """
        record: dict[str, Any] = {}
        predictions: list[dict[str, Any]] = []
        reports: dict[Scope, Mapping[str, ClassFigures]] = {}
        for scope in scopes:
            shards = self._shards(sample)
            views = self._views(server, store, scope, shards)
            evidence = self._evidence(views, progress)
            rows = np.concatenate([view.rows for view in views])
            overall = self._measure(evidence, rows)
            by_client = self._by_client(evidence, shards)
            if scope == "global":
                record |= {"global": overall, "clients": by_client}
            else:
                record["personal"] = {"overall": overall, **by_client}
            predictions += self._predictions(evidence, rows, scope)
            if evidence.classes is not None and evidence.chosen is not None:
                right, chosen = evidence.classes[rows], evidence.chosen[rows]
                reports[scope] = classification_report(right, chosen, self.label_names)
        if "bleu" in self.names:
            record["signatures"] = {"bleu": str(bleu().get_signature())}
        return Evaluation(record, predictions, reports)

    def _fits(self, need: Need) -> bool:
        if need == "classes":
            return self.task == "classification"
        if need in ("preferences", "pairs"):
            return self.task == "preference" or (self.task == "rated" and need == "preferences")
        return need == "tokens" or self.kind == "causal-lm"

    @property
    def _generates(self) -> bool:
        needs = {METRICS[name].needs for name in self.names}
        return self.kind == "causal-lm" and bool(needs & {"answers", "classes"})

    def _shards(self, sample: bool) -> list[np.ndarray]:
        """Return each client's test rows, of a sample if asked."""
        shards = [self.partition.test(cid) for cid in range(self.partition.num_clients)]
        most = self.config.max_rows
        if not sample or most is None or most >= len(self.tokens):
            return shards
        chosen = np.zeros(len(self.tokens), dtype=bool)
        stream = rng(self.seed, "evaluation")
        chosen[stream.choice(len(self.tokens), most, replace=False)] = True
        return [rows[chosen[rows]] for rows in shards]

    def _views(
        self, server: Views, store: StateStore, scope: Scope, shards: Sequence[np.ndarray]
    ) -> list[View]:
        if scope == "global":
            payload = server.view()
            return [View(payload.adapter, payload.base, np.sort(np.concatenate(shards)))]
        views, mixes = [], []
        cids = [cid for cid, rows in enumerate(shards) if len(rows)]
        for cid in cids:
            payload = server.view(cid, store.get(cid))
            views.append(View(payload.adapter, payload.base, shards[cid]))
            mixes.append(payload.mix)
        return self._mixed(views, mixes, cids)

    def _mixed(
        self, views: Sequence[View], mixes: Sequence[Mix | None], cids: Sequence[int]
    ) -> list[View]:
        """Weigh the paths of views that ask for it, by how like each row is to the client's own."""
        asking = [i for i, mix in enumerate(mixes) if mix is not None]
        weighed = list(views)
        if not asking:
            return weighed
        mix = mixes[asking[0]]
        assert mix is not None
        alike = self.scorer.similarity(
            [_alone(views[i], mix) for i in asking],
            [cids[i] for i in asking],
            self.tokens,
            references=mix.references,
            seed=self.seed,
        )
        for i, cosine in zip(asking, alike, strict=True):
            share = np.clip(mix.strength * cosine, 0.0, 1.0)
            local = 1.0 - share if mix.is_flipped else share
            weighed[i] = replace(views[i], mix={mix.common: 1.0 - local, mix.local: local})
        return weighed

    def _evidence(self, views: Sequence[View], progress: Callable[[int], None] | None) -> Evidence:
        scores = self.scorer.score(views, self.tokens)
        answers: dict[int, str] = {}
        if self._generates:
            answers = self.scorer.generate(
                views,
                self.tokens,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
                progress=progress,
            )
        chosen = scores.choice if self.kind != "causal-lm" else None
        if self._generates:
            ids = {name.strip().lower(): i for i, name in enumerate(self.label_names)}
            chosen = np.full(len(self.tokens), -1)
            for row, answer in answers.items():
                chosen[row] = ids.get(answer.strip().lower(), -1)
        return Evidence(scores, self.tokens.references, answers, self.tokens.labels, chosen)

    def _measure(self, evidence: Evidence, rows: np.ndarray) -> dict[str, float]:
        return {name: METRICS[name].compute(evidence, rows) for name in self.names}

    def _by_client(self, evidence: Evidence, shards: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return each client's metrics, their mean over clients and that of the worst 10 %."""
        found = {c: self._measure(evidence, rows) for c, rows in enumerate(shards) if len(rows)}
        mean, worst = {}, {}
        for name in self.names:
            values = np.sort([m[name] for m in found.values()])
            if not METRICS[name].is_higher_better:
                values = values[::-1]
            few = max(math.ceil(0.1 * len(values)), 1)
            mean[name] = float(values.mean()) if len(values) else math.nan
            worst[name] = float(values[:few].mean()) if len(values) else math.nan
        return {
            "mean": mean,
            "worst_10": worst,
            "by_client": {str(cid): metrics for cid, metrics in found.items()},
        }

    def _predictions(
        self, evidence: Evidence, rows: np.ndarray, scope: Scope
    ) -> list[dict[str, Any]]:
        owner = np.full(len(self.tokens), -1)
        for cid in range(self.partition.num_clients):
            owner[self.partition.test(cid)] = cid
        lines = []
        for row in rows.tolist():
            line = {
                "row": row,
                "client": int(owner[row]),
                "view": scope,
                **({"prompt": self.prompts[row]} if self.prompts else {}),
                "reference": evidence.references[row],
            }
            if row in evidence.answers:
                line |= {"prediction": evidence.answers[row], "is_right": bool(evidence.exact[row])}
            elif evidence.classes is not None and evidence.chosen is not None:
                line["prediction"] = self.label_names[int(evidence.chosen[row])]
            else:
                continue
            if evidence.classes is not None and evidence.chosen is not None:
                line["is_right"] = bool(evidence.chosen[row] == evidence.classes[row])
            lines.append(line)
        return lines


def _alone(view: View, mix: Mix) -> View:
    """Return the view without its common path."""
    own = view.adapter.select(lambda name: slot_of(name) != mix.common or is_head(name))
    return replace(view, adapter=own)
