"""What is measured on held-out rows: a table of metrics over one body of evidence. No torch."""

from __future__ import annotations

import importlib.util
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedllm.errors import MissingExtraError

if TYPE_CHECKING:
    from fedllm.federation import AnswerScores, Scores

Need = Literal["tokens", "classes", "answers", "preferences", "pairs"]


@dataclass(frozen=True)
class Evidence:
    """All that metrics are computed from, row by row of the test set."""

    scores: Scores
    references: Sequence[str]
    """Gold answers, or names of the right classes."""
    answers: Mapping[int, str] = field(default_factory=dict)
    """Generated answers, by row; rows that were not asked for are absent."""
    classes: np.ndarray | None = None
    """Right class of each row, int (rows,)."""
    chosen: np.ndarray | None = None
    """Class the model chose, int (rows,); -1 where its answer names none."""

    @cached_property
    def exact(self) -> np.ndarray:
        """Whether each answer is right as a whole, float (rows,)."""
        return self._by_row(_is_same)

    @cached_property
    def final_number(self) -> np.ndarray:
        """Whether the last number of each answer is the reference's, float (rows,)."""
        return self._by_row(lambda a, r: _same_number(final_number(a), final_number(r)))

    @cached_property
    def token_f1(self) -> np.ndarray:
        """Overlap of words, float (rows,)."""
        return self._by_row(_word_f1)

    @cached_property
    def rouge(self) -> Mapping[str, np.ndarray]:
        """ROUGE-1, 2 and L F-measure with stemming, each float (rows,)."""
        from rouge_score.rouge_scorer import RougeScorer

        names = ("rouge1", "rouge2", "rougeL")
        scorer = RougeScorer(list(names), use_stemmer=True)
        found = {name: np.full(len(self.references), np.nan) for name in names}
        for row, answer in self.answers.items():
            for name, score in scorer.score(self.references[row], answer).items():
                found[name][row] = score.fmeasure
        return found

    def _by_row(self, judge: Callable[[str, str], float]) -> np.ndarray:
        values = np.full(len(self.references), np.nan)
        for row, answer in self.answers.items():
            values[row] = judge(answer, self.references[row])
        return values


@dataclass(frozen=True)
class Metric:
    """A number over some rows of the evidence."""

    summary: str
    needs: Need
    """What must have been computed: teacher-forced tokens, chosen classes, generated answers, what
    the model prefers of answers that are judged, or of pairs alone."""
    compute: Callable[[Evidence, np.ndarray], float]
    is_higher_better: bool = True
    package: str | None = None
    """A module of the extra `eval` that it needs."""


def _mean(of: Callable[[Evidence], np.ndarray]) -> Callable[[Evidence, np.ndarray], float]:
    return lambda evidence, rows: float(np.mean(of(evidence)[rows])) if len(rows) else math.nan


def _loss(evidence: Evidence, rows: np.ndarray) -> float:
    count = evidence.scores.count[rows].sum()
    return float(evidence.scores.loss_sum[rows].sum() / count) if count else math.nan


def _perplexity(evidence: Evidence, rows: np.ndarray) -> float:
    loss = _loss(evidence, rows)
    return math.exp(min(loss, 700.0))


def _tokens(evidence: Evidence, rows: np.ndarray) -> float:
    count = evidence.scores.count[rows].sum()
    return float(evidence.scores.correct[rows].sum() / count) if count else math.nan


def _class_accuracy(evidence: Evidence, rows: np.ndarray) -> float:
    right, chosen = _classes(evidence, rows)
    return float((right == chosen).mean()) if len(rows) else math.nan


def _macro_f1(evidence: Evidence, rows: np.ndarray) -> float:
    """Return the mean over the classes that occur of each one's F1."""
    from sklearn.metrics import f1_score

    right, chosen = _classes(evidence, rows)
    if not len(rows):
        return math.nan
    return float(f1_score(right, chosen, labels=np.unique(right), average="macro", zero_division=0))


def _preference(
    of: Callable[[AnswerScores], np.ndarray],
) -> Callable[[Evidence, np.ndarray], float]:
    def compute(evidence: Evidence, rows: np.ndarray) -> float:
        assert evidence.scores.preferences is not None
        return float(np.mean(of(evidence.scores.preferences)[rows])) if len(rows) else math.nan

    return compute


def _classes(evidence: Evidence, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert evidence.classes is not None
    assert evidence.chosen is not None
    return evidence.classes[rows], evidence.chosen[rows]


def _bleu(evidence: Evidence, rows: np.ndarray) -> float:
    """Return the BLEU of all answers as one corpus, 0 to 100 as sacrebleu counts."""
    asked = [row for row in rows.tolist() if row in evidence.answers]
    if not asked:
        return math.nan
    answers = [evidence.answers[row] for row in asked]
    return float(bleu().corpus_score(answers, [[evidence.references[r] for r in asked]]).score)


@cache
def bleu() -> Any:
    """Return sacrebleu's BLEU with its default settings, which its signature names."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


METRICS: Mapping[str, Metric] = {
    "loss": Metric("mean cross-entropy of held-out answers, nats a token", "tokens", _loss, False),
    "perplexity": Metric("exp(loss)", "tokens", _perplexity, False),
    "token_accuracy": Metric(
        "answer tokens that no other token is likelier than", "tokens", _tokens
    ),
    "accuracy": Metric("rows whose class is right", "classes", _class_accuracy),
    "macro_f1": Metric("F1 of each class, averaged (scikit-learn)", "classes", _macro_f1),
    "final_number": Metric(
        "answers whose last number is the reference's", "answers", _mean(lambda e: e.final_number)
    ),
    "exact_match": Metric(
        "answers that are right as a whole; after '####', only that number counts",
        "answers",
        _mean(lambda e: e.exact),
    ),
    "token_f1": Metric("word overlap, as SQuAD counts it", "answers", _mean(lambda e: e.token_f1)),
    "rouge_1": Metric("shared words, F-measure", "answers", _mean(lambda e: e.rouge["rouge1"])),
    "rouge_2": Metric(
        "shared pairs of words, F-measure", "answers", _mean(lambda e: e.rouge["rouge2"])
    ),
    "rouge_l": Metric(
        "longest common subsequence, F-measure", "answers", _mean(lambda e: e.rouge["rougeL"])
    ),
    "bleu": Metric(
        "n-grams shared over the whole corpus, 0 to 100 (sacrebleu)",
        "answers",
        _bleu,
        package="sacrebleu",
    ),
    "reward_accuracy": Metric(
        "pairs whose better answer gained more on the base than the worse one; rated answers that"
        " gained as wanted, or lost as unwanted",
        "preferences",
        _preference(lambda p: p.margins > 0),
    ),
    "reward_margin": Metric(
        "mean implicit reward, beta log(model / base), of better over worse answers; of rated ones"
        " their own, unwanted ones negative",
        "preferences",
        _preference(lambda p: p.margins),
    ),
    "preference_loss": Metric(
        "mean DPO loss of pairs, or KTO loss of rated answers",
        "preferences",
        _preference(lambda p: p.losses),
        False,
    ),
    "chosen_logps": Metric(
        "mean log-probability of better answers, nats",
        "pairs",
        _preference(lambda p: p.logps[:, 0]),
    ),
    "rejected_logps": Metric(
        "mean log-probability of worse answers, nats",
        "pairs",
        _preference(lambda p: p.logps[:, 1]),
        False,
    ),
}

BY_TASK: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "loss"),
    "math": ("final_number", "loss", "perplexity", "token_accuracy"),
    "qa": ("exact_match", "token_f1", "rouge_l", "loss", "token_accuracy"),
    "chat": ("token_accuracy", "loss", "perplexity"),
    "text": ("token_accuracy", "loss", "perplexity"),
    "preference": (
        "reward_accuracy",
        "reward_margin",
        "preference_loss",
        "chosen_logps",
        "rejected_logps",
        "loss",
    ),
    "rated": ("reward_accuracy", "reward_margin", "preference_loss", "loss"),
}
"""What `evaluation.metrics: auto` takes; the first is the main metric."""


def require_packages(names: Iterable[str]) -> None:
    """Refuse metrics whose library is not installed; unknown names pass.

    Raises:
        MissingExtraError: Naming the first one and what brings it.
    """
    for name in names:
        package = METRICS[name].package if name in METRICS else None
        if package is not None and importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "eval", f"the metric '{name}'")


def normalise(text: str) -> str:
    """Return text as answers are compared: lower case, words and numbers, no articles.

    As SQuAD does it, but a number keeps its sign and its decimal point: "1.5 km" is not "15 km".
    Where nothing would be left ("A", "?"), the article or the punctuation stays.

    >>> normalise("The answer is: -1,072.5 km.")
    'answer is -1072.5 km'
    """
    bare = _PUNCTUATION.sub(lambda mark: mark[1] or "", text.lower())
    words = bare.split()
    kept = [word for word in words if word not in {"a", "an", "the"}]
    return " ".join(kept or words or text.split())


_PUNCTUATION = re.compile(rf"((?<=\d)\.(?=\d)|(?<!\w)-(?=\d))|[{re.escape(string.punctuation)}]")
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*|-?\.\d+")


def final_number(text: str) -> float | None:
    """Return the number after the last '####', else the last number in the text, if any.

    >>> final_number("48 / 2 = 24, so 48 + 24 = 72. #### 1,072")
    1072.0
    """
    marked = text.rsplit("####", 1)
    found = _NUMBER.findall(marked[-1])
    if not found:
        return None
    chosen = found[0] if len(marked) > 1 else found[-1]
    return float(chosen.replace(",", "").rstrip("."))


def _same_number(a: float | None, b: float | None) -> float:
    return float(a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6))


def _is_same(answer: str, reference: str) -> float:
    if "####" in reference:
        return _same_number(final_number(answer), final_number(reference))
    return float(normalise(answer) == normalise(reference))


def _word_f1(answer: str, reference: str) -> float:
    said, gold = normalise(answer).split(), normalise(reference).split()
    if not said or not gold:
        return float(said == gold)
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold))
