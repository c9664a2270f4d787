"""Metrics on cases worked out by hand, with scikit-learn and rouge-score as oracles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

from fedllm.evaluation import METRICS, Evidence
from fedllm.evaluation.metrics import final_number, normalise
from fedllm.federation import Scores


def answered(pairs: Sequence[tuple[str, str]]) -> Evidence:
    """Evidence of (answer, reference) rows."""
    references = [reference for _, reference in pairs]
    answers = {i: answer for i, (answer, _) in enumerate(pairs)}
    return Evidence(Scores.empty(len(pairs)), references, answers)


def measure(name: str, evidence: Evidence, rows: Sequence[int] | None = None) -> float:
    chosen = np.arange(len(evidence.references)) if rows is None else np.array(rows, dtype=int)
    return METRICS[name].compute(evidence, chosen)


def test_loss_perplexity_and_token_accuracy_weigh_rows_by_their_tokens() -> None:
    scores = Scores(
        loss_sum=np.array([2.0, 9.0, 0.0]),
        count=np.array([4, 6, 0]),
        correct=np.array([1, 3, 0]),
        choice=np.zeros(3, dtype=int),
    )
    evidence = Evidence(scores, ["", "", ""])
    assert measure("loss", evidence) == 1.1
    assert measure("perplexity", evidence) == math.exp(1.1)
    assert measure("token_accuracy", evidence) == 0.4
    assert measure("loss", evidence, [0]) == 0.5
    assert measure("token_accuracy", evidence, [1]) == 0.5
    for name in ("loss", "perplexity", "token_accuracy"):
        assert math.isnan(measure(name, evidence, [2]))
        assert math.isnan(measure(name, evidence, []))


def test_a_hopeless_loss_has_a_finite_perplexity() -> None:
    scores = Scores(np.array([5000.0]), np.array([1]), np.array([0]), np.array([0]))
    assert math.isfinite(measure("perplexity", Evidence(scores, [""])))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=30))
def test_class_metrics_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    right, chosen = np.array(pairs).T
    evidence = Evidence(Scores.empty(len(pairs)), [""] * len(pairs), classes=right, chosen=chosen)
    assert measure("accuracy", evidence) == pytest.approx(accuracy_score(right, chosen))
    each = [f1_score(right == c, chosen == c, zero_division=0) for c in sorted(set(right))]
    assert measure("macro_f1", evidence) == pytest.approx(np.mean(each))


def test_macro_f1_by_hand() -> None:
    evidence = Evidence(
        Scores.empty(4),
        [""] * 4,
        classes=np.array([0, 0, 1, 2]),
        chosen=np.array([0, 1, 1, -1]),
    )
    assert measure("accuracy", evidence) == 0.5
    # class 0: precision 1, recall 1/2; class 1: precision 1/2, recall 1; class 2: never found
    assert measure("macro_f1", evidence) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert math.isnan(measure("macro_f1", evidence, []))
    assert math.isnan(measure("accuracy", evidence, []))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 / 2 = 24, so 48 + 24 = 72. #### 1,072", 1072),
        ("The answer is 7", 7),
        ("first 3, then 12.", 12),
        ("It costs $1,234.50.", 1234.5),
        ("minus: -5", -5),
        ("-0.25", -0.25),
        (".5 of it", 0.5),
        ("#### 18 apples, not 20", 18),
        ("#### 1 #### 2", 2),
        ("####-3", -3),
        ("5.", 5),
        ("50%", 50),
        ("12,000,000", 12e6),
        ("#### ", None),
        ("12 #### none", None),
        ("no number", None),
        ("", None),
        ("####", None),
        ("..., -", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: float | None) -> None:
    assert final_number(text) == number


@given(st.integers(-(10**9), 10**9), st.text("abc .,:$", max_size=10))
def test_a_number_at_the_end_is_found_whatever_stands_before(number: int, text: str) -> None:
    assert final_number(f"{text} {number}") == number
    assert final_number(f"{text} #### {number:,}") == number


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("so 72", "#### 72", 1),
        ("72.0", "#### 72", 1),
        ("1,000", "1000", 1),
        ("72.1", "#### 72", 0),
        ("0", "0.0", 1),
        ("", "#### 72", 0),
        ("none", "none", 0),
    ],
)
def test_final_number_compares_values(answer: str, reference: str, value: float) -> None:
    assert measure("final_number", answered([(answer, reference)])) == value


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("Paris", "paris", 1),
        ("The  Paris.", "paris", 1),
        ("in Paris", "paris", 0),
        ("", "paris", 0),
        ("", "", 1),
        ("", "A", 0),
        ("the", "A", 0),
        ("A", "A", 1),
        ("a.", "A", 1),
        ("", "?", 0),
        ("some words #### 7", "other words #### 7", 1),
        ("7", "2 + 5 #### 7", 1),
        ("8", "2 + 5 #### 7", 0),
    ],
)
def test_exact_match_compares_normalised_answers(answer: str, reference: str, value: float) -> None:
    assert measure("exact_match", answered([(answer, reference)])) == value


def test_normalising_is_squads() -> None:
    assert normalise("  The Cat, an  a-b the!") == "cat ab"
    assert normalise(normalise("The theory of a Thing.")) == "theory of thing"


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("the red car", "red car", 1),
        ("red red car", "red car", 2 * 2 / (3 + 2)),
        ("red", "red car", 2 * 1 / (1 + 2)),
        ("blue", "red car", 0),
        ("", "red car", 0),
        ("", "", 1),
    ],
)
def test_token_f1_counts_common_words(answer: str, reference: str, value: float) -> None:
    assert measure("token_f1", answered([(answer, reference)])) == pytest.approx(value)


def test_rouge_l_by_hand_and_by_its_library() -> None:
    # longest common subsequence "the cat mat": 3 of 4 words and 3 of 5
    evidence = answered([("the cat the mat", "the cat on a mat")])
    assert measure("rouge_l", evidence) == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    pairs = [("runs fast", "running fast now"), ("", "x"), ("a b c", "c b a")]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = [scorer.score(r, a)["rougeL"].fmeasure for a, r in pairs]
    assert measure("rouge_l", answered(pairs)) == pytest.approx(np.mean(wanted))
    assert wanted[0] > 0.7


def test_answers_are_averaged_over_the_asked_rows_alone() -> None:
    evidence = answered([("a b", "a b"), ("x", "y"), ("z", "z")])
    assert measure("exact_match", evidence) == pytest.approx(2 / 3)
    assert measure("exact_match", evidence, [1]) == 0
    assert measure("exact_match", evidence, [0, 2]) == 1
    assert math.isnan(measure("exact_match", evidence, []))
