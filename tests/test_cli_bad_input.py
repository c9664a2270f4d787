"""Every kind of bad input gets one clear message, exit code 2, and no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_world import fails, write_config

TinyModel = Callable[[str], Path]


def rows(folder: Path, *lines: object) -> Path:
    file = folder / "bad.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


GOOD = {"prompt": "1 + 1", "completion": "2"}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "bad.jsonl"),
        ((*[GOOD] * 9, {"prompt": "1 + 2"}), "completion"),
        ((*[GOOD] * 9, {"prompt": "1 + 2", "completion": ""}), "bad.jsonl"),
        (({"word": "a", "other": "b"},) * 9, "columns"),
        (({"prompt": "x" * 999, "completion": "y"},) * 9, "max_length"),
        ((GOOD,) * 2, "num_clients"),
    ],
    ids=["empty", "no answer", "blank answer", "unknown columns", "too long", "too few"],
)
def test_bad_rows_are_refused(
    command: str, lines: tuple[object, ...], said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"), data=rows(tmp_path, *lines))
    assert said in fails(command, file)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.path=nothing.jsonl", "nothing.jsonl"),
        ("data.columns={prompt: question}", "question"),
        ("data.path=builtin:skils", "Did you mean 'skills'?"),
        ("model.path=./nowhere", "nowhere"),
        ("model.path=builtin:tny", "Did you mean 'tiny'?"),
        ("adapter.targets=[q_prj]", "q_prj"),
        ("model.device=cuda:99", "not available"),
        ("model.chat_template=chatm", "chatml"),
        ("training.batch_size=0", "training.batch_size"),
        ("algorithm.flip_every=2", "unknown key"),
        ("evaluation.metrics=[acuracy]", "Did you mean 'accuracy'?"),
        ("nonsense", "section.key=value"),
    ],
)
def test_a_wrong_setting_is_refused(
    command: str, word: str, said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"))
    assert said in fails(command, file, word)
    assert not (tmp_path / "runs").exists()


def test_labels_that_only_the_test_rows_have_are_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    data = rows(tmp_path, *({"text": f"film {i}", "label": "ab"[i % 2]} for i in range(12)))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"text": "film", "label": "zzz"}) + "\n")
    words = (f"data.test_path={test}", "evaluation.metrics=auto")
    file = write_config(tmp_path, tiny_model("bert"), *words, data=data)
    assert "zzz" in fails("run", file)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_is_kept(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"), "training.learning_rate=1e38")
    text = fails("run", file)
    assert "Lower training.learning_rate" in text
    assert str(tmp_path / "runs" / "one") in text
    log = (tmp_path / "runs" / "one" / "log.txt").read_text()
    assert "the server rejected every update of the round" in log
    assert "not finite from local step 2 on" in log


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_model_without_a_tokenizer_is_refused(
    command: str, tiny_copy: TinyModel, tmp_path: Path
) -> None:
    model = tiny_copy("llama")
    for file in model.glob("*token*"):
        file.unlink()
    assert "tokenizer" in fails(command, write_config(tmp_path, model))


def test_an_output_folder_that_cannot_be_written_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path, tiny_model("llama"))
    text = fails("run", config, f"output_dir={tmp_path / 'file' / 'runs'}")
    assert "Nothing was written" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert said in fails("check", file)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert "cannot be read" in fails("run", tmp_path)
