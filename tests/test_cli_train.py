"""`fedllm train` as its users meet it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from central_runs import answers
from typer.testing import CliRunner

from fedllm.cli import app

pytestmark = pytest.mark.filterwarnings("ignore")  # as `fedllm` itself does

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples" / "central").glob("*.yaml"))
SMALL = ("data.max_train_rows=24", "data.max_test_rows=4", "evaluation.max_new_tokens=2")


def fedllm(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done.output


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a small configuration in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    answers(tmp_path / "answers.jsonl")
    tree = {
        "stage": "sft",
        "name": "mine",
        "model": {"device": "cpu", "dtype": "float32"},
        "data": {"path": "answers.jsonl", "cache": False},
        "training": {"max_steps": 2},
        "evaluation": {"metrics": ["loss"]},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_run_says_how_it_goes_and_what_to_do_next(config: Path) -> None:
    told = fedllm("train", str(config))
    assert "step 2/2  loss" in told
    assert "written to runs/mine/adapter" in told
    assert "central sft, lora" in fedllm("show", "runs/mine")
    again = fedllm("train", str(config), code=2)
    assert "fedllm train --resume runs/mine" in again
    assert "has ended" in fedllm("train", "--resume", "runs/mine", code=2)


def test_quiet_prints_the_path_alone(config: Path) -> None:
    assert fedllm("train", str(config), "--quiet").strip() == "runs/mine"


def test_a_dry_run_shows_the_mask_and_writes_nothing(config: Path) -> None:
    told = fedllm("train", str(config), "--dry-run")
    for word in ("trainable", "steps", "memory", "Repeat", "learned", "no run was written"):
        assert word in told
    assert not Path("runs").exists()
    assert "trainable" in fedllm("check", str(config))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.rnk=2"], "Did you mean 'rank'?"),
        (["adapter.targets=[q_prj]"], "Did you mean 'q_proj'"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["adapter.method=freeze", "adapter.freeze_layers=99"], "freeze_layers: 99"),
        (["stage=dpo"], "stage that fits: sft, grpo"),
        (["training.optimizer=adamx"], "training.optimizer: Unknown optimizer 'adamx'"),
    ],
)
def test_what_is_wrong_is_told_without_a_traceback(
    config: Path, words: list[str], told: str
) -> None:
    output = fedllm("train", str(config), *words, code=2)
    assert told in output
    assert "Traceback" not in output
    assert not Path("runs").exists()


def test_a_file_that_is_not_there_and_a_resume_with_a_file_are_refused(config: Path) -> None:
    assert "no file other.yaml" in fedllm("train", "other.yaml", code=2)
    assert "leave" in fedllm("train", str(config), "--resume", "runs/mine", code=2)
    assert "not a run directory" in fedllm("train", "--resume", "runs/mine", code=2)
    assert "fedllm train" in fedllm("run", str(config), code=2)


def test_a_file_of_llamafactory_is_converted_to_one_of_ours(config: Path) -> None:
    theirs = config.with_name("theirs.yaml")
    theirs.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": "builtin:tiny",
                "stage": "sft",
                "dataset": "answers.jsonl",
                "dataset_dir": "ONLINE",
                "template": "llama3",
                "output_dir": "runs/theirs",
                "max_steps": 1,
            }
        )
    )
    told = fedllm("train", str(theirs), "--convert", "ours.yaml")
    assert "dataset -> data.path" in told
    assert "template: 'llama3'" in told
    assert "training.max_steps" in told
    fedllm("check", "ours.yaml")
    assert "exists" in fedllm("train", str(theirs), "--convert", "ours.yaml", code=2)
    assert "Did you mean 'max_steps'" in fedllm("train", str(theirs), "max_step=3", code=2)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_with_its_command_and_is_valid(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = example.read_text().splitlines()[0]
    assert opening.startswith(f"# fedllm train {example.relative_to(ROOT)}:")
    monkeypatch.chdir(tmp_path)
    assert "example" in fedllm("train", str(example), "--dry-run", *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["tiny_lora_sft", "tiny_full_pt", "tiny_pissa_sft", "tiny_lora_dpo", "llamafactory_lora_sft"],
)
def test_a_small_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = ROOT / "examples" / "central" / f"{name}.yaml"
    run = name.replace("_", "-")
    fedllm("train", str(example), *SMALL, "training.batch_size=4")
    assert "evaluation" in fedllm("show", f"runs/{run}")


@pytest.mark.parametrize("module", ["configure", "run_config", "stages", "llamafactory"])
def test_checking_a_central_configuration_does_not_import_torch(module: str) -> None:
    code = (
        f"import sys, fedllm.central.{module}\n"
        "from fedllm.central.configure import make_central\n"
        "make_central({'stage': 'sft'})\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "it imports torch"
