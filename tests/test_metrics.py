"""Metrics on cases worked out by hand, with scikit-learn and rouge-score as oracles."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score
from tiny_tokenizers import tiny_tokenizer

from fedllm.config import DataConfig
from fedllm.data import load_dataset
from fedllm.errors import MissingExtraError
from fedllm.evaluation import METRICS, Evidence, classification_report
from fedllm.evaluation.metrics import final_number, normalise
from fedllm.experiment import make_config
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


# bleu, rouge, classes


def test_bleu_is_sacrebleus_over_the_whole_corpus() -> None:
    pairs = [
        ("The car accelerated rapidly on the road.", "The car accelerated rapidly on the road."),
        ("rapidly The accelerated car on a way.", "The car accelerated rapidly down a way."),
        ("nothing alike", "something else entirely"),
    ]
    evidence = answered(pairs)
    expected = sacrebleu.corpus_bleu([a for a, _ in pairs], [[r for _, r in pairs]]).score
    assert measure("bleu", evidence) == pytest.approx(expected)
    assert measure("bleu", evidence, [0]) == pytest.approx(100.0)
    # words in another order are worth little, whatever letters they have
    assert measure("bleu", evidence, [1]) < 30
    assert math.isnan(measure("bleu", evidence, []))


def test_rouge_counts_words_pairs_and_sequences() -> None:
    evidence = answered([("a b c d", "a b d c")])
    assert measure("rouge_1", evidence) == pytest.approx(1.0)
    assert measure("rouge_2", evidence) == pytest.approx(1 / 3)
    assert measure("rouge_l", evidence) == pytest.approx(3 / 4)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=30))
def test_a_class_report_is_counted_by_hand(pairs: list[tuple[int, int]]) -> None:
    right, chosen = np.array(pairs).T
    report = classification_report(right, chosen, ["a", "b", "c"])
    assert list(report) == ["a", "b", "c"]
    for place, figures in enumerate(report.values()):
        hits = int(((right == place) & (chosen == place)).sum())
        has, called = int((right == place).sum()), int((chosen == place).sum())
        assert figures.support == has
        assert figures.recall == pytest.approx(hits / has if has else 0)
        assert figures.precision == pytest.approx(hits / called if called else 0)
        assert figures.f1 == pytest.approx(2 * hits / (has + called) if hits else 0)


def test_a_metric_without_its_library_is_refused_when_the_configuration_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'bleu' needs 'sacrebleu'.*fedllm\[eval\]"):
        make_config({"evaluation": {"metrics": ["loss", "bleu"]}})
    assert make_config({"evaluation": {"metrics": ["loss", "rouge_1"]}})
    assert make_config({})


# prompts


def test_what_a_model_is_asked_does_not_depend_on_the_reference(tmp_path: Path) -> None:
    def prompts(answer: str) -> list[list[int]]:
        rows = [{"prompt": f"What is {n} + {n}?", "completion": answer * (n + 1)} for n in range(6)]
        file = tmp_path / f"{len(answer)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(path=str(file), test_path=str(file))
        tokens = load_dataset(config, tiny_tokenizer("llama3"), kind="causal-lm", seed=0).test
        assert set(tokens.references) == {answer * (n + 1) for n in range(6)}
        lengths = tokens.prompt_lengths
        return [tokens.row(row)[0][: lengths[row]].tolist() for row in range(6)]

    assert prompts("4") == prompts("a much longer answer with 100 words ")
