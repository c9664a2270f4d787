"""MMLU by hand and against the model's own log-softmax; lm-eval on a task of our own."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest
import torch
from cli_world import call, fails, write_config
from pyarrow import parquet
from small_runs import write_labels, write_questions
from tiny_models import causal

from fedllm.errors import DataError, MissingExtraError
from fedllm.evaluation.choices import (
    ChoiceResult,
    Question,
    Subject,
    answer_choices,
    model_likelihoods,
    read_subjects,
)
from fedllm.experiment.trained import open_trained

TinyModel = Callable[[str], Path]
DEV = "1 + 1?,1,2,3,4,B\n2 + 2?,4,2,3,1,A\n"
TEST = '"1 + 2?",1,2,3,4,C\n"What, then?",4,2,3,1,D\n'


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    folder = tmp_path / "mmlu"
    for split, text in (("dev", DEV), ("test", TEST)):
        (folder / split).mkdir(parents=True)
        (folder / split / f"high_school_sums_{split}.csv").write_text(text)
    return folder


# reading


def test_the_prompt_is_the_benchmarks_own(mmlu: Path) -> None:
    (subject,) = read_subjects(mmlu)
    assert subject.prompt(subject.questions[1], 1) == (
        "The following are multiple choice questions (with answers) about high school sums.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "What, then?\nA. 4\nB. 2\nC. 3\nD. 1\nAnswer:"
    )
    assert [question.answer for question in subject.questions] == [2, 3]


def test_the_hubs_layout_holds_the_same(mmlu: Path, tmp_path: Path) -> None:
    (subject,) = read_subjects(mmlu)
    for place in ("high_school_sums", "all"):
        (tmp_path / "hub" / place).mkdir(parents=True)
        for split, questions in (("dev", subject.shots), ("test", subject.questions)):
            rows = [{"question": q.text, "choices": list(q.choices), "answer": q.answer}
                    for q in questions]  # fmt: skip
            file = tmp_path / "hub" / place / f"{split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read_subjects(tmp_path / "hub") == [subject]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("q,1,2,3,4,E", "high_school_sums_test.csv:1: expected a question"),
        ("q,1,2,3,4,", "columns that end in ''"),
        ("q", "found 1 columns"),
        ("", "is empty"),
    ],
)
def test_a_malformed_row_is_named(row: str, told: str, mmlu: Path) -> None:
    (mmlu / "test" / "high_school_sums_test.csv").write_text(row + "\n")
    with pytest.raises(DataError, match=told):
        read_subjects(mmlu)


def test_a_folder_without_questions_says_how_one_looks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dev/SUBJECT_dev\.csv"):
        read_subjects(tmp_path)


# answering


def sums(name: str, *answers: int) -> Subject:
    questions = tuple(Question(str(i), ("a", "b", "c", "d"), a) for i, a in enumerate(answers))
    return Subject(name, questions[:1], questions)


def test_averages_are_over_subjects_and_over_questions() -> None:
    def always_c(texts: Sequence[Sequence[int]], shared: int) -> list[float]:
        return [-3.0, -2.0, -1.0, -2.5]

    subjects = [sums("one", 2, 0, 2), sums("two", 2)]
    found = answer_choices(
        subjects, always_c, lambda text: list(text.encode()), shots=1, longest=None
    )
    assert found.subjects == {"one": 2 / 3, "two": 1.0}
    assert found.macro == pytest.approx(5 / 6)
    assert found.micro == 3 / 4
    assert found.shortened == 0


def test_shots_give_way_to_the_models_positions() -> None:
    subject = sums("one", 1)
    seen: list[int] = []

    def first(texts: Sequence[Sequence[int]], shared: int) -> list[float]:
        seen.append(len(texts[0]))
        return [0.0, -1.0, -1.0, -1.0]

    def encode(text: str) -> Sequence[int]:
        return list(text.encode())

    short = len(encode(subject.prompt(subject.questions[0], 0))) + 2
    found = answer_choices([subject], first, encode, shots=1, longest=short)
    assert found == ChoiceResult({"one": 0.0}, {"one": 1}, shortened=1)
    assert seen == [short]
    with pytest.raises(DataError, match=f"knows {short - 1} positions"):
        answer_choices([subject], first, encode, shots=1, longest=short - 1)


def test_likelihoods_are_the_models_log_softmax(tiny_model: TinyModel) -> None:
    model = causal(tiny_model("llama")).model
    prompt = [5, 9, 200, 31]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        both = model(input_ids=torch.tensor([[*prompt, 7]])).logits[0, -1].double().log_softmax(-1)
    likelihoods = model_likelihoods(model)
    one = likelihoods([[*prompt, token] for token in (7, 8, 9)], 4)
    assert one == pytest.approx([float(logs[token]) for token in (7, 8, 9)], abs=1e-5)
    two = likelihoods([[*prompt, 7, 11], [*prompt, 8]], 4)
    assert two == pytest.approx([float(logs[7] + both[11]), float(logs[8])], abs=1e-5)


def test_mmlu_on_a_model_is_what_its_logits_say(
    mmlu: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    code, text = call("eval", "builtin:tiny", "--mmlu", mmlu, "--save", tmp_path / "x.json")
    assert code == 0, text
    loaded = open_trained("builtin:tiny").whole()
    (subject,) = read_subjects(mmlu)
    right = 0
    for question in subject.questions:
        prompt = subject.prompt(question, 5)
        scores = []
        for letter in "ABCD":
            ids = torch.tensor([loaded.tokenizer(f"{prompt} {letter}")["input_ids"]])
            with torch.no_grad():
                logs = loaded.model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
            scores.append(float(logs.gather(1, ids[0, 1:, None])[-1]))
        right += scores.index(max(scores)) == question.answer
    saved = json.loads((tmp_path / "x.json").read_text())["mmlu"]
    assert saved["micro"] == right / 2
    assert saved["subjects"] == {"high_school_sums": {"accuracy": right / 2, "count": 2}}
    assert "mean over questions" in text


# lm-eval

TASK = """\
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: c
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_task_of_our_own_runs_in_lm_eval(tmp_path: Path, tiny_model: TinyModel) -> None:
    rows = [{"q": f"{n} + 1 =", "c": ["2", "3", "4"], "a": n % 3} for n in range(4)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK.format(rows=tmp_path / "rows.jsonl")
    (tmp_path / "tasks" / "tiny_sums.yaml").write_text(task)
    words = ("--lm-eval", "tiny_sums", "--include-path", tmp_path / "tasks")
    save = ("--save", tmp_path / "x.json")
    code, text = call("eval", tiny_model("llama"), *words, *save)
    assert code == 0, text
    found = json.loads((tmp_path / "x.json").read_text())["lm_eval"]["tiny_sums"]["acc,none"]
    loaded = open_trained(tiny_model("llama")).whole()
    right = 0
    for row in rows:
        scores = []
        for choice in row["c"]:  # type: ignore[attr-defined]
            asked = loaded.tokenizer(row["q"])["input_ids"]
            ids = torch.tensor([loaded.tokenizer(f"{row['q']} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = loaded.model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
            scores.append(float(logs.gather(1, ids[0, 1:, None])[len(asked) - 1 :].sum()))
        right += scores.index(max(scores)) == row["a"]
    assert found == right / 4


def test_a_misspelt_task_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tasks:
        """Knows two tasks, as lm-eval's own reader would after half a minute."""

        def __init__(self, include_path: str | None, include_defaults: bool = True) -> None:
            self.all_tasks = ["arc_easy", "hellaswag"] if include_defaults else []

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Tasks)
    text = fails("eval", "builtin:tiny", "--lm-eval", "helaswag")
    assert "Unknown lm-eval task 'helaswag'. Did you mean 'hellaswag'?" in text


def test_without_lm_eval_the_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedllm.experiment.benchmarks import check_harness

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"fedllm\[eval\]"):
        check_harness(["x"], None)


# rows


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--mmlu", "x", "--lm-eval", "y"), "two evaluations"),
        (("--mmlu", "x", "--data", "y"), "two evaluations"),
        (("--shots", "1"), "--shots goes with"),
        (("--include-path", "x"), "--include-path goes with --lm-eval"),
        (("--metrics", "blue"), "Did you mean 'bleu'?"),
        ((), "give some with --data PATH"),
        (("--scope", "both"), "is for federated runs"),
        (("--client", "1"), "is for federated runs"),
        (("--lm-eval", "x", "--include-path", "/no/such"), "no such folder"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: tuple[str, ...], told: str) -> None:
    assert told in fails("eval", "builtin:tiny", *words)


@pytest.mark.slow
def test_an_adapter_is_worth_on_rows_what_its_run_is(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows = write_questions(tmp_path / "rows.jsonl", 8)
    words = (f"data.test_path={rows}", "evaluation.metrics=[loss,exact_match,bleu]")
    assert call("run", write_config(tmp_path, tiny_model("llama"), *words, data=rows), "-q")[0] == 0
    run = tmp_path / "runs" / "one"
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval"]
    assert record["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a")
    assert call("export", run, "--to", tmp_path / "adapter")[0] == 0
    words = ("--data", str(rows), "--metrics", "loss,rouge_1,bleu", "--save")
    code, text = call("eval", tmp_path / "adapter", *words, tmp_path / "x.json")
    assert code == 0, text
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["round"] is None
    assert len(saved["predictions"]) == 8
    # the adapter is added to weights here, and applied beside them in the run
    assert math.isclose(saved["eval"]["global"]["loss"], record["global"]["loss"], rel_tol=2e-2), (
        saved["eval"]
    )
    assert set(saved["eval"]["global"]) == {"loss", "rouge_1", "bleu"}


@pytest.mark.slow
def test_classes_are_reported_one_by_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows = write_labels(tmp_path / "labels.jsonl")
    words = ("evaluation.metrics=[accuracy]", "model.kind=sequence-classification")
    file = write_config(tmp_path, tiny_model("bert"), *words, data=rows)
    assert call("run", file, "-q")[0] == 0
    code, text = call("eval", tmp_path / "runs" / "one", "--save", tmp_path / "x.json")
    assert code == 0, text
    saved = json.loads((tmp_path / "x.json").read_text())
    report = saved["classes"]["global"]
    assert list(report) == ["dull", "joy"] or list(report) == ["joy", "dull"]
    lines = saved["predictions"]
    for name, figures in report.items():
        has = [line for line in lines if line["reference"] == name]
        called = [line for line in lines if line["prediction"] == name]
        right = sum(line["is_right"] for line in has)
        assert figures["support"] == len(has)
        assert figures["recall"] == pytest.approx(right / len(has))
        assert figures["precision"] == pytest.approx(right / len(called) if called else 0)
    assert "precision" in text
