"""Multiple choice by log-likelihood, from a folder in the layout of MMLU."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from fedllm.errors import DataError

_LAYOUT = (
    "Give a folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv (question, choices, letter;"
    " no header), or with SUBJECT/dev-*.parquet and SUBJECT/test-*.parquet as on the hub"
)


@dataclass(frozen=True)
class Question:
    """One question."""

    text: str
    choices: tuple[str, ...]
    answer: int
    """Place of the right choice."""

    def written(self, *, is_answered: bool) -> str:
        """Return the question as the benchmark's authors write it."""
        lines = [f"{ascii_uppercase[i]}. {choice}" for i, choice in enumerate(self.choices)]
        end = f" {ascii_uppercase[self.answer]}\n\n" if is_answered else ""
        return "\n".join([self.text, *lines, "Answer:"]) + end


@dataclass(frozen=True)
class Subject:
    """The questions of one subject."""

    name: str
    shots: tuple[Question, ...]
    """Solved ones to put before each question."""
    questions: tuple[Question, ...]

    def prompt(self, question: Question, shots: int) -> str:
        """Return what the model reads before it answers."""
        head = (
            "The following are multiple choice questions (with answers) about"
            f" {self.name.replace('_', ' ')}.\n\n"
        )
        solved = "".join(shot.written(is_answered=True) for shot in self.shots[:shots])
        return head + solved + question.written(is_answered=False)


@dataclass(frozen=True)
class ChoiceResult:
    """How many questions were answered rightly."""

    subjects: Mapping[str, float]
    """Share of right answers, by subject."""
    counts: Mapping[str, int]
    """Questions, by subject."""
    shortened: int
    """Questions that had to do with fewer shots, because the model's positions ended."""

    @property
    def macro(self) -> float:
        """Mean over subjects."""
        return sum(self.subjects.values()) / len(self.subjects)

    @property
    def micro(self) -> float:
        """Mean over questions."""
        right = sum(self.subjects[name] * count for name, count in self.counts.items())
        return right / sum(self.counts.values())


def read_subjects(folder: Path) -> list[Subject]:
    """Read all subjects of a folder, by name.

    Raises:
        DataError: If it is not laid out so, or a row is malformed; named by file and line.
    """
    found = _by_files(folder) or _by_folders(folder)
    if not found:
        raise DataError(f"{folder} holds no multiple-choice questions. {_LAYOUT}")
    return [Subject(name, tuple(d), tuple(t)) for name, (d, t) in sorted(found.items())]


def answer_choices(
    subjects: Sequence[Subject],
    likelihoods: Callable[[Sequence[Sequence[int]], int], list[float]],
    encode: Callable[[str], Sequence[int]],
    *,
    shots: int,
    longest: int | None,
    progress: Callable[[int], None] | None = None,
) -> ChoiceResult:
    """Answer each question by the letter whose continuation of the prompt is likeliest.

    Args:
        subjects: What is asked.
        likelihoods: From token ids of several texts and the number of tokens they share to the log
            probability of the rest of each.
        encode: From a text to its token ids.
        shots: Solved questions put before each.
        longest: Most tokens of a text; None for no limit.
        progress: Called with the number of questions answered so far.
    """
    shares, done, shortened = {}, 0, 0
    for subject in subjects:
        right = 0
        for question in subject.questions:
            texts, used = _continued(subject, question, encode, shots, longest)
            shortened += used < min(shots, len(subject.shots))
            scores = likelihoods(texts, _shared(texts))
            right += scores.index(max(scores)) == question.answer
            done += 1
            if progress is not None:
                progress(done)
        shares[subject.name] = right / len(subject.questions)
    return ChoiceResult(shares, {s.name: len(s.questions) for s in subjects}, shortened)


def model_likelihoods(model: Any) -> Callable[[Sequence[Sequence[int]], int], list[float]]:
    """Return the `likelihoods` of a causal language model.

    One pass over the shared tokens is enough where each text has one token of its own.
    """
    import torch

    @torch.no_grad()
    def likelihoods(texts: Sequence[Sequence[int]], shared: int) -> list[float]:
        if all(len(text) == shared + 1 for text in texts):
            ids = torch.tensor([list(texts[0][:shared])], device=model.device)
            last = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            return [float(last[text[shared]]) for text in texts]
        found = []
        for text in texts:
            ids = torch.tensor([list(text)], device=model.device)
            logs = model(input_ids=ids).logits[0, shared - 1 : -1].float().log_softmax(-1)
            own = ids[0, shared:].unsqueeze(1)
            found.append(float(logs.gather(1, own).sum()))
        return found

    return likelihoods


def _continued(
    subject: Subject,
    question: Question,
    encode: Callable[[str], Sequence[int]],
    shots: int,
    longest: int | None,
) -> tuple[list[Sequence[int]], int]:
    """Return the tokens of the prompt with each letter behind it, and how many shots fit."""
    for used in range(min(shots, len(subject.shots)), -1, -1):
        prompt = subject.prompt(question, used)
        letters = ascii_uppercase[: len(question.choices)]
        texts = [encode(f"{prompt} {letter}") for letter in letters]
        if longest is None or max(map(len, texts)) <= longest:
            return texts, used
    raise DataError(
        f"{subject.name}: a question has {max(map(len, texts))} tokens without any shot, and the"
        f" model knows {longest} positions: {question.text[:60]!r}. Take the question out, or a"
        " model with more positions"
    )


def _shared(texts: Sequence[Sequence[int]]) -> int:
    columns = zip(*texts, strict=False)
    shortest = min(map(len, texts))
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), shortest - 1)


def _by_files(folder: Path) -> dict[str, tuple[list[Question], list[Question]]]:
    """Read the layout of the benchmark's authors."""
    found = {}
    for file in sorted(folder.glob("test/*.csv")):
        name = file.stem.removesuffix("_test")
        dev = folder / "dev" / f"{name}_dev.csv"
        found[name] = (_rows_of_csv(dev) if dev.is_file() else [], _rows_of_csv(file))
    return found


def _by_folders(folder: Path) -> dict[str, tuple[list[Question], list[Question]]]:
    """Read the hub's layout: a folder for each subject; `all` and `auxiliary_train` repeat them."""
    found = {}
    for place in sorted(path for path in folder.glob("*/") if path.is_dir()):
        tests = sorted(place.glob("test-*.parquet"))
        if tests and place.name not in ("all", "auxiliary_train"):
            shots = _rows_of_parquet(sorted(place.glob("dev-*.parquet")))
            found[place.name] = (shots, _rows_of_parquet(tests))
    return found


def _rows_of_csv(file: Path) -> list[Question]:
    questions = []
    with file.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.reader(lines), start=1):
            if not row:
                continue
            *choices, letter = row[1:] or [""]
            answer = ascii_uppercase.find(letter.strip()) if len(letter.strip()) == 1 else -1
            if len(choices) < 2 or not 0 <= answer < len(choices):
                raise DataError(
                    f"{file}:{number}: expected a question, its choices and the right one's letter,"
                    f" and found {len(row)} columns that end in {letter!r}. {_LAYOUT}"
                )
            questions.append(Question(row[0], tuple(choices), answer))
    if not questions:
        raise DataError(f"{file} is empty. {_LAYOUT}")
    return questions


def _rows_of_parquet(files: Iterable[Path]) -> list[Question]:
    from pyarrow import ArrowException, parquet

    questions = []
    for file in files:
        try:
            rows = parquet.read_table(file, columns=["question", "choices", "answer"]).to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read: {error}. {_LAYOUT}") from None
        for number, row in enumerate(rows, start=1):
            if not 0 <= int(row["answer"]) < len(row["choices"]):
                raise DataError(f"{file}, row {number}: the answer is none of the choices")
            questions.append(
                Question(str(row["question"]), tuple(row["choices"]), int(row["answer"]))
            )
    return questions
