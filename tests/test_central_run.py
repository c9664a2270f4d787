"""Central runs: every stage and method learns, and what is written is what was trained."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from central_runs import (
    WORDS,
    Silent,
    answers,
    central,
    go_on,
    losses,
    run_dir,
    texts,
    weights,
    write_lines,
)
from safetensors.torch import load_file
from small_runs import Silent as SilentFederation
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedllm.adapters.peft_format import load_peft
from fedllm.central import stages as stages_module
from fedllm.central.parts import build
from fedllm.central.run import train
from fedllm.config import CentralConfig
from fedllm.errors import FedLLMError, RunError, TrainingError
from fedllm.experiment import make_config
from fedllm.experiment.run import run as run_federation
from fedllm.models.sources import locate
from fedllm.results import RunDir, overview
from fedllm.results.compare import compare

pytestmark = pytest.mark.filterwarnings("ignore")  # as `fedllm` itself does


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a file for each shape of rows."""
    folder = tmp_path_factory.mktemp("central-data")
    asked = [f"Repeat {WORDS[i % 8]} {i}" for i in range(24)]
    pairs = [
        {"prompt": p, "chosen": f"{p[7:]} yes", "rejected": f"no {i}"} for i, p in enumerate(asked)
    ]
    rated = [
        {"prompt": p, "completion": f"yes {i}" if i % 2 else "no way", "label": bool(i % 2)}
        for i, p in enumerate(asked)
    ]
    return {
        "answers": answers(folder / "answers.jsonl"),
        "texts": texts(folder / "texts.jsonl"),
        "pairs": write_lines(folder / "pairs.jsonl", pairs),
        "rated": write_lines(folder / "rated.jsonl", rated),
        "prompts": answers(folder / "prompts.jsonl"),
    }


@pytest.fixture(scope="module")
def base() -> str:
    """Give the folder of the built-in model."""
    return str(locate(CentralConfig(stage="sft").model))


def evaluated(run: RunDir) -> list[dict[str, float]]:
    return [record["eval"]["global"] for record in run.read("metrics")]


# stages


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_a_stage_of_tokens_lowers_its_loss_on_other_rows(
    stage: str, data: dict[str, Path], tmp_path: Path
) -> None:
    file = data[stages_module.STAGES[stage].shape]
    run = run_dir(central(tmp_path, file, stage, "evaluation.every=2", "training.max_steps=6"))
    found = evaluated(run)
    assert len(found) == 4
    assert found[-1]["loss"] < found[0]["loss"]
    assert all(math.isfinite(loss) for loss in losses(run))


@pytest.mark.parametrize("stage", ["dpo", "kto", "rm", "orpo", "simpo"])
def test_a_stage_of_comparisons_widens_the_margin_between_answers(
    stage: str, data: dict[str, Path], tmp_path: Path
) -> None:
    file = data[stages_module.STAGES[stage].shape]
    run = run_dir(central(tmp_path, file, stage, "evaluation.every=3", "training.max_steps=6"))
    first, *_, last = evaluated(run)
    assert last["reward_margin"] > first["reward_margin"]
    assert last["preference_loss"] < first["preference_loss"]
    assert run.read("metrics")[-1]["main_metric"] == "reward_accuracy"


@pytest.mark.parametrize(("stage", "before"), [("dpo", math.log(2)), ("kto", 0.5)])
def test_where_nothing_is_learned_yet_the_reference_is_the_model_itself(
    stage: str, before: float, data: dict[str, Path], tmp_path: Path
) -> None:
    # without a difference in log-probabilities, -log sigmoid(0) and 1 - sigmoid(0) are left
    file = data[stages_module.STAGES[stage].shape]
    run = run_dir(central(tmp_path, file, stage, "training.max_steps=1", "adapter.method=full"))
    assert losses(run)[0] == pytest.approx(before, abs=1e-5)


def log_probabilities(parts: Any, tokens: Any) -> list[torch.Tensor]:
    """Return the log-probabilities of the answer tokens of each row."""
    found = []
    for row in range(len(tokens)):
        ids, learned = tokens.row(row)
        whole = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = parts.tuned.loaded.model(input_ids=whole).logits[0, :-1].double()
        own = logits.log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        found.append(own[torch.from_numpy(learned[1:])])
    return found


@pytest.mark.parametrize("stage", ["simpo", "dpo"])
def test_the_loss_of_pairs_is_that_of_the_paper(
    stage: str, data: dict[str, Path], tmp_path: Path
) -> None:
    # all rows in one batch; for DPO against the same model, with the loss of answers added
    words = ("training.batch_size=18", "training.max_steps=1", "objective.beta=0.7",
             "objective.simpo_gamma=0.3")  # fmt: skip
    more = ("objective.sft_weight=0.25",) if stage == "dpo" else ()
    config = central(tmp_path, data["pairs"], stage, *words, *more)
    parts = build(config)
    better = log_probabilities(parts, parts.data.train)
    if stage == "simpo":
        worse = log_probabilities(parts, parts.data.train.rejected)
        gap = torch.stack([b.mean() - w.mean() for b, w in zip(better, worse, strict=True)])
        expected = -torch.nn.functional.logsigmoid(0.7 * gap - 0.3).mean()
    else:
        expected = math.log(2) - 0.25 * torch.cat(better).mean()
    assert losses(run_dir(config))[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_loss_of_a_reward_model_is_that_of_bradley_and_terry(
    data: dict[str, Path], tmp_path: Path
) -> None:
    config = central(
        tmp_path, data["pairs"], "rm", "training.batch_size=18", "training.max_steps=1"
    )
    parts = build(config)
    rewards = []
    for tokens in (parts.data.train, parts.data.train.rejected):
        assert tokens is not None
        rows = [torch.from_numpy(tokens.row(i)[0].astype(np.int64))[None] for i in range(18)]
        with torch.no_grad():
            rewards.append(torch.cat([parts.tuned.loaded.model(input_ids=r).logits for r in rows]))
    expected = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).mean()
    assert losses(run_dir(config))[0] == pytest.approx(float(expected), rel=1e-4)


def test_grpo_draws_answers_and_follows_a_reward_of_the_users_own(
    data: dict[str, Path], tmp_path: Path
) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def brief(answer, reference):\n    return -float(len(answer))\n")
    run = run_dir(
        central(
            tmp_path,
            data["prompts"],
            "grpo",
            f"objective.rewards=['{judge}:brief', exact]",
            "objective.max_new_tokens=8",
            "training.batch_size=16",
            "training.max_steps=6",
        )
    )
    rewards = [line["reward"] for line in run.read("trainer_log")]
    assert len(rewards) == 6
    assert np.mean(rewards[3:]) > np.mean(rewards[:3])


def test_a_reward_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    from fedllm.central.rewards import reward_function

    file = tmp_path / "judge.py"
    file.write_text("def brief(a, r): return 1.0\n")
    with pytest.raises(FedLLMError, match=r"no function 'breif'\. Did you mean 'brief'"):
        reward_function(f"{file}:breif")
    with pytest.raises(FedLLMError, match="no file"):
        reward_function("nowhere.py:brief")
    assert reward_function("final_number")(["so 4", "5"], ["#### 4", "4"]) == [1.0, 0.0]
    assert reward_function("short")(["ab", "abcd", ""], ["ab"] * 3) == [1.0, 0.5, 0.0]


# methods


@pytest.mark.parametrize(
    "words",
    [
        ("adapter.dora=true",),
        ("adapter.init=pissa", "adapter.targets=all-linear"),
        ("adapter.loraplus_ratio=8", "adapter.rslora=true"),
        ("adapter.method=freeze", "adapter.freeze_layers=-1"),
        ("adapter.method=full", "training.gradient_checkpointing=true"),
        ("adapter.method=full", "training.precision=bfloat16"),
    ],
    ids=["dora", "pissa", "loraplus", "freeze", "full", "mixed precision"],
)
def test_what_is_written_is_the_model_that_was_evaluated(
    words: Sequence[str], data: dict[str, Path], tmp_path: Path, base: str
) -> None:
    config = central(tmp_path, data["answers"], "sft", *words)
    run = run_dir(config)
    last = evaluated(run)[-1]
    if config.adapter.method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run.path / "adapter"
        )
        folder = run.path / "adapter"
    else:
        folder = run.path / "model"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (folder / "chat_template.jinja").is_file()
    assert AutoTokenizer.from_pretrained(folder).chat_template
    test = build(config).data.test
    total = count = 0.0
    for row in range(len(test)):
        ids, learned = test.row(row)
        labels = torch.from_numpy(np.where(learned, ids, -100).astype(np.int64))[None]
        with torch.no_grad():
            loss = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], labels=labels).loss
        total, count = total + float(loss) * learned.sum(), count + learned.sum()
    # a run in bfloat16 was evaluated in it, and that has eight bits
    is_rough = config.training.precision == "bfloat16"
    assert total / count == pytest.approx(last["loss"], rel=1e-2 if is_rough else 2e-3)


def test_a_trained_adapter_says_which_base_it_belongs_to(
    data: dict[str, Path], tmp_path: Path
) -> None:
    config = central(tmp_path, data["answers"], "sft", "training.max_steps=1")
    run = run_dir(config)
    origin = json.loads((run.path / "adapter" / "fedllm.json").read_text())
    assert origin["base_hash"] == build(config).tuned.loaded.base_hash
    assert origin["algorithm"] == "central sft"
    adapter = load_peft(run.path / "adapter")
    assert adapter.modules
    assert origin["adapter_sha256"] == adapter.digest()


def test_a_reward_model_keeps_its_head(data: dict[str, Path], tmp_path: Path, base: str) -> None:
    from peft import PeftModel

    run = run_dir(central(tmp_path, data["pairs"], "rm", "training.max_steps=2"))
    saved = weights(run)
    (head,) = [name for name in saved if name.endswith("score.weight")]
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    whole = PeftModel.from_pretrained(model, run.path / "adapter")
    loaded = [p for n, p in whole.named_parameters() if "score.modules_to_save.default" in n]
    assert torch.equal(loaded[0], saved[head])


@pytest.mark.parametrize("method", ["lora", "freeze", "full"])
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_base_in_16_bits_is_trained_in_32(
    method: str, precision: str, data: dict[str, Path], tmp_path: Path
) -> None:
    words = ("model.dtype=bfloat16", f"adapter.method={method}", "training.packing=true",
             "training.batch_size=1", f"training.precision={precision}")  # fmt: skip
    run = run_dir(central(tmp_path, data["answers"], "sft", *words, "training.max_steps=2"))
    saved = weights(run)
    assert any(tensor.dtype == torch.float32 for tensor in saved.values())
    assert math.isfinite(evaluated(run)[-1]["loss"])


@pytest.mark.slow
def test_qlora_trains_on_a_base_in_4_bits_and_does_not_spoil_it(
    data: dict[str, Path], tmp_path: Path
) -> None:
    words = ("model.quantization=4bit", "adapter.targets=all-linear", "training.max_steps=8")
    run = run_dir(central(tmp_path, data["answers"], "sft", *words, "evaluation.every=2"))
    found = [values["loss"] for values in evaluated(run)]
    assert found[-1] < found[0]
    assert all(w.dtype == torch.float32 for w in weights(run).values())


# packing and noise


def test_packed_examples_do_not_see_each_other(data: dict[str, Path], tmp_path: Path) -> None:
    # one step on the same rows, apart and packed: the same gradient, so the same weights
    words = ("training.max_steps=1", "training.shuffle=false", "training.optimizer=sgd",
             "training.learning_rate=1.0", "training.max_grad_norm=0")  # fmt: skip
    apart = run_dir(
        central(tmp_path, data["answers"], "sft", *words, "name=apart", "training.batch_size=18")
    )
    packed = run_dir(
        central(tmp_path, data["answers"], "sft", *words, "name=packed", "training.packing=true",
                "training.batch_size=9")
    )  # fmt: skip
    a, b = weights(apart), weights(packed)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in a.items() if "lora_B" in name)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)
    assert (
        packed.read("metrics")[-1]["train"]["tokens"]
        == apart.read("metrics")[-1]["train"]["tokens"]
    )


def test_a_model_in_which_packed_examples_would_meet_is_refused(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = build(central(tmp_path, data["answers"], "sft", "training.packing=true"))
    from fedllm.central.packed import check_packing

    check_packing(parts.tuned)
    own = parts.tuned.body.forward
    # what a model does that does not look at positions
    monkeypatch.setattr(parts.tuned.body, "forward", lambda position_ids=None, **rest: own(**rest))
    with pytest.raises(FedLLMError, match="would see each other"):
        check_packing(parts.tuned)


def test_noise_on_embeddings_changes_training_but_not_evaluation(
    data: dict[str, Path], tmp_path: Path
) -> None:
    words = ("training.max_steps=1", "evaluation.every=1")
    plain = run_dir(central(tmp_path, data["answers"], "sft", *words, "name=plain"))
    noisy = run_dir(
        central(tmp_path, data["answers"], "sft", *words, "name=noisy", "training.neftune_alpha=9")
    )
    assert losses(plain) != losses(noisy)
    assert evaluated(plain)[0] == evaluated(noisy)[0]


# the course of a run


def test_a_run_writes_what_it_was_and_how_it_went(data: dict[str, Path], tmp_path: Path) -> None:
    words = ("evaluation.metrics=[exact_match, loss]", "evaluation.every=2", "checkpoint.every=2",
             "evaluation.max_new_tokens=4")  # fmt: skip
    run = run_dir(central(tmp_path, data["answers"], "sft", *words))
    names = {path.name for path in run.path.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "trainer_log.jsonl",
                     "timing.jsonl", "log.txt", "plots", "adapter", "predictions"}  # fmt: skip
    line = run.read("trainer_log")[0]
    assert {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time",
            "remaining_time"} <= set(line)  # fmt: skip
    assert [r["round"] for r in run.read("metrics")] == [0, 1, 2]
    assert [r["step"] for r in run.read("metrics")] == [0, 2, 4]
    assert (run.path / "plots" / "training_loss.png").is_file()
    log = (run.path / "log.txt").read_text()
    for told in ("steps 1 to 4", "evaluation 1 at step 2: exact_match", "saved checkpoint-2",
                 "evaluation 2 at step 4", "wrote adapter"):  # fmt: skip
        assert told in log
    assert (run.path / "checkpoints" / "checkpoint-2" / "fedllm.json").is_file()
    lines = (run.path / "predictions" / "2.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert {"prompt", "reference", "prediction", "is_right"} <= set(json.loads(lines[0]))
    facts = overview(run)
    assert facts.is_finished
    assert facts.algorithm == "central sft, lora"


def test_a_run_is_never_overwritten(data: dict[str, Path], tmp_path: Path) -> None:
    config = central(tmp_path, data["answers"], "sft", "training.max_steps=1")
    train(config, Silent())
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="fedllm train --resume"):
        train(config, Silent())
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_rows(
    data: dict[str, Path], tmp_path: Path
) -> None:
    words = ("training.learning_rate=1e37", "adapter.method=full")
    with pytest.raises(TrainingError, match=r"in step \d+, on the rows .*answers.jsonl:\d+"):
        train(central(tmp_path, data["answers"], "sft", *words, "training.scheduler=constant"),
              Silent())  # fmt: skip


def test_training_ends_early_and_the_best_weights_are_kept(
    data: dict[str, Path], tmp_path: Path
) -> None:
    # so high a rate that the loss on other rows soon rises
    words = ("training.max_steps=40", "training.learning_rate=0.2", "evaluation.every=1",
             "evaluation.early_stopping_patience=2", "evaluation.best_model=true",
             "training.scheduler=constant")  # fmt: skip
    run = run_dir(central(tmp_path, data["answers"], "sft", *words))
    records = run.read("metrics")
    found = [values["loss"] for values in evaluated(run)]
    assert records[-1]["step"] < 40
    assert records[-1]["ended"] == "no better loss in 2 evaluations"
    assert found[-1] == pytest.approx(min(found[1:]), rel=1e-6)
    assert found[-2] > found[-1]
    assert overview(run).is_finished


@pytest.mark.parametrize(
    ("tracker", "remedy"), [("wandb", r"fedllm\[track\]"), ("trackio", "pip install trackio")]
)
def test_a_missing_tracker_is_told_before_anything_is_loaded(
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracker: str,
    remedy: str,
) -> None:
    config = central(tmp_path, data["answers"], "sft", f"tracking={tracker}")
    real = stages_module.importlib.util.find_spec
    monkeypatch.setattr(
        stages_module.importlib.util, "find_spec", lambda n: None if n == tracker else real(n)
    )
    with pytest.raises(FedLLMError, match=remedy):
        train(config, Silent())
    assert not config.run_dir.exists()


def test_tensorboard_is_written_where_it_is_asked_for(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    config = central(tmp_path, data["answers"], "sft", "tracking=tensorboard")
    train(config, Silent())
    assert list(config.run_dir.rglob("events.out.tfevents.*"))


def test_a_scheduler_that_transformers_does_not_have_is_named(
    data: dict[str, Path], tmp_path: Path
) -> None:
    config = central(tmp_path, data["answers"], "sft", "training.scheduler=cosin")
    with pytest.raises(FedLLMError, match="Did you mean 'cosine'"):
        build(config)


# rows that are read while training goes on


@pytest.mark.slow
def test_a_local_file_is_streamed_again_and_again_in_the_same_order(
    data: dict[str, Path], tmp_path: Path
) -> None:
    words = ("data.streaming=true", f"data.test_path={data['prompts']}", "checkpoint.every=4",
             "training.max_steps=10", "training.dataloader_workers=0",
             "evaluation.every=5")  # fmt: skip
    first = run_dir(central(tmp_path, data["answers"], "sft", *words, "name=first"))
    again = run_dir(central(tmp_path, data["answers"], "sft", *words, "name=again"))
    assert len(losses(first)) == 10  # of 6 rows each, where the file has 24
    assert losses(first) == losses(again)
    assert first.read("metrics")[-1]["train"]["tokens"] > 0
    found = [values["loss"] for values in evaluated(first)]
    assert found[-1] < found[0]
    # as after a kill behind the checkpoint
    shutil.rmtree(again.path / "adapter")
    shutil.rmtree(again.path / "checkpoints" / "checkpoint-8")
    resumed = go_on(again.path)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(resumed)[name])


# against a federation

EPSILON = 1e-6
"""Of AdamW: where a gradient is rounding alone (1e-9), one of 1e-8 makes whole steps of its sign.
This is above such rounding, and far below the gradients that count."""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_central_run_equals_a_federation_of_one_client(
    optimizer: str, data: dict[str, Path], tmp_path: Path
) -> None:
    # All rows are one batch, so their order has no part in it. SGD keeps no moments, so three
    # rounds of an epoch are three epochs; AdamW's start anew each round, so it has one of three.
    rounds, epochs = (3, 1) if optimizer == "sgd" else (1, 3)
    rate = {"sgd": 0.5, "adamw": 3e-3}[optimizer]
    tree: dict[str, Any] = {
        "name": "federated",
        "output_dir": str(tmp_path),
        "model": {"device": "cpu", "dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"path": str(data["answers"]), "holdout": 0.25, "max_length": 64, "cache": False},
        "federation": {"num_clients": 1, "rounds": rounds},
        "training": {"batch_size": 18, "local_epochs": epochs, "optimizer": optimizer,
                     "learning_rate": rate, "epsilon": EPSILON},
        "evaluation": {"metrics": ["loss", "token_accuracy"]},
    }  # fmt: skip
    federated = run_federation(make_config(tree), SilentFederation())
    whole = run_dir(
        central(
            tmp_path,
            data["answers"],
            "sft",
            "name=central",
            "training={batch_size: 18, epochs: 3, scheduler: constant}",
            f"training.optimizer={optimizer}",
            f"training.learning_rate={rate}",
            f"training.epsilon={EPSILON}",
            "evaluation.every=epoch",
        )
    )
    file = federated.path / "checkpoints" / str(rounds) / "adapter" / "adapter_model.safetensors"
    theirs, ours = load_file(file), weights(whole)
    assert set(theirs) == set(ours)
    tolerance = 1e-4
    assert max(t.abs().max() for n, t in ours.items() if "lora_B" in n) > 20 * tolerance
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0)
    last = [run.read("metrics")[-1]["eval"]["global"]["loss"] for run in (federated, whole)]
    assert last[0] == pytest.approx(last[1], abs=1e-4)
    groups = compare([federated.path, whole.path])
    assert {group.runs[0].metric for group in groups} == {"loss"}
