"""What `fedllm train` wrote, shown, evaluated, exported, talked to and compared by the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from central_runs import Silent, answers, central, write_lines
from cli_world import call, fails, write_config
from serving_worlds import LIMITS, Reply, prompt_of, running
from typer.testing import CliRunner

from fedllm.adapters.reading import origin_of
from fedllm.central.run import train
from fedllm.cli import app
from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.experiment.trained import open_trained, require_base
from fedllm.models import load_model
from fedllm.serving import find_source
from fedllm.serving.host import Host

pytestmark = pytest.mark.filterwarnings("ignore")  # as `fedllm` itself does

STRONG = ("training.learning_rate=0.02", "training.max_steps=6", "model.path=builtin:tiny")
KINDS = {
    "lora": ("sft",),
    "rslora": ("sft", "adapter.rslora=true"),
    "full": ("sft", "adapter.method=full", "training.learning_rate=0.002"),
    "qlora": ("sft", "model.quantization=4bit"),
    "dora": ("sft", "adapter.dora=true"),
    "dpo": ("dpo",),
    "rm": ("rm",),
}
ADAPTERS = ("lora", "rslora", "qlora", "dpo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run of a kind, carried out when first asked for."""
    folder = tmp_path_factory.mktemp("central")
    rows = answers(folder / "answers.jsonl")
    pairs = write_lines(
        folder / "pairs.jsonl",
        [{"prompt": f"Say {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(24)],
    )
    done: dict[str, Path] = {}

    def carried_out(name: str) -> Path:
        if name not in done:
            stage, *words = KINDS[name]
            data = rows if stage == "sft" else pairs
            words = [*STRONG, "evaluation.metrics=auto", *words, f"name={name}"]
            done[name] = train(central(folder / "runs", data, stage, *words), Silent())
        return done[name]

    return carried_out


def talk(path: Path, text: str = "Repeat river 3\n") -> str:
    done = CliRunner().invoke(app, ["chat", str(path), "--max-tokens", "6"], input=text)
    assert done.exit_code == 0, done.output
    return done.stdout


def mmlu(folder: Path) -> Path:
    """Write two questions in MMLU's format, and as many solved ones."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        text = "".join(f"What is {i}?,{i},7,8,9,A\n" for i in range(5))
        (folder / split / f"high_school_sums_{split}.csv").write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_shown_as_what_it_is(kind: str, runs: Callable[[str], Path]) -> None:
    code, text = call("show", runs(kind))
    assert code == 0
    assert f"central {KINDS[kind][0]}" in text
    assert "6 steps" in text
    assert "clients" not in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full", "qlora", "dora", "dpo"])
def test_an_evaluation_finds_the_loss_that_training_ended_with(
    kind: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    path = runs(kind)
    code, text = call("eval", path, "--metrics", "loss", "--save", tmp_path / "out.json")
    assert code == 0, text
    found = json.loads((tmp_path / "out.json").read_text())
    last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    # a packed base is unpacked for evaluation, which rounds elsewhere
    assert found["eval"]["global"]["loss"] == pytest.approx(
        last["eval"]["global"]["loss"], rel=2e-2 if kind == "qlora" else 1e-3
    )


@pytest.mark.slow
def test_multiple_choice_takes_a_run(runs: Callable[[str], Path], tmp_path: Path) -> None:
    code, text = call("eval", runs("lora"), "--mmlu", mmlu(tmp_path / "m"), "--shots", "1")
    assert code == 0, text
    assert "high_school_sums" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_verified(kind: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    code, text = call("export", runs(kind), "--to", tmp_path / "m", "--merged", "--verify")
    assert code == 0, text
    assert "verified on" in text
    if kind != "full":
        code, text = call("export", runs(kind), "--to", tmp_path / "p", "--verify")
        assert code == 0, text
    if kind == "rm":
        score = load_model(
            ModelConfig(path=str(tmp_path / "m"), device="cpu"), kind="sequence-classification"
        ).model
        assert score.config.num_labels == 1
        assert score.config.problem_type == "regression"
    else:
        assert talk(tmp_path / "m").strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gguf_of_a_run(kind: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    code, text = call("export", runs(kind), "--to", tmp_path / "g", "--format", "gguf", "--verify")
    assert code == 0, text
    assert list((tmp_path / "g").glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ADAPTERS, "full"])
def test_what_is_served_is_what_was_trained(kind: str, runs: Callable[[str], Path]) -> None:
    source = find_source(str(runs(kind)))
    assert source.names == (("global",) if kind == "full" else ("global", "base"))
    with running(Host(source, LIMITS)) as host:
        prompt = prompt_of(host, "Repeat river 3")
        reply = Reply(host, "global", prompt, max_tokens=8)
        reply.text()
    words: dict[str, Any] = {} if kind != "qlora" else {"quantization": "4bit"}
    trained = open_trained(runs(kind))
    model: Any
    if kind == "qlora":
        from peft import PeftModel

        base = load_model(trained.artifact.model.model_copy(update=words), kind="causal-lm").model
        model = PeftModel.from_pretrained(base, str(trained.adapter))
    else:
        model = trained.whole().model
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert reply.one.tokens == out[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_chat_and_server_take_a_runs_folder_and_its_adapters(runs: Callable[[str], Path]) -> None:
    said = talk(runs("lora"))
    assert said.strip()
    assert talk(runs("lora") / "adapter") == said
    assert find_source(str(runs("qlora") / "adapter")).model.quantization == "4bit"


@pytest.mark.slow
def test_what_cannot_be_served_says_what_to_do(runs: Callable[[str], Path]) -> None:
    told = " ".join(fails("chat", runs("dora")).split())
    assert "use_dora" in told
    assert f"fedllm export {runs('dora')}/adapter --to MERGED --merged" in told
    assert "reward model" in fails("chat", runs("rm"))
    assert "fedllm show" in fails("eval", runs("rm"))


@pytest.mark.slow
def test_an_adapter_of_a_packed_base_goes_with_that_base_alone(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(runs("qlora") / "adapter", tmp_path / "adapter"))
    origin = dict(origin_of(adapter))
    assert origin["base_quantization"] == "4bit"
    config = ModelConfig(path="builtin:tiny", dtype="float32", device="cpu")
    loaded = load_model(config, kind="causal-lm")
    require_base(adapter, config, loaded)  # the same weights, not packed
    (adapter / "fedllm.json").write_text(json.dumps({**origin, "base_hash": "0" * 64}))
    with pytest.raises(ModelError, match="is not the base model"):
        require_base(adapter, config, loaded)


@pytest.mark.slow
def test_a_central_run_is_compared_with_a_federated_one(
    runs: Callable[[str], Path], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    config = write_config(tmp_path, tiny_model("llama"), "evaluation.metrics=[loss]")
    code, text = call("run", config, "--quiet")
    assert code == 0, text
    code, text = call("compare", runs("lora"), tmp_path / "runs" / "one", "--target", "loss=9")
    assert code == 0, text
    assert "central sft" in text
    assert "loss" in text


def test_each_command_names_the_other(
    runs: Callable[[str], Path], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    federated = write_config(tmp_path, tiny_model("llama"))
    assert f"fedllm run {federated}" in " ".join(fails("train", federated).split())
    stage = tmp_path / "central.yaml"
    stage.write_text("stage: sft\n")
    assert f"fedllm train {stage}" in " ".join(fails("run", stage).split())
    assert "fedllm train --resume" in fails("run", "--resume", runs("lora"))
