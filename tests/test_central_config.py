"""Central configurations: which settings go together, and LLaMA-Factory's files as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm.central.configure import load_central, make_central
from fedllm.central.llamafactory import mapped
from fedllm.central.llamafactory_keys import IGNORED, REFUSED, RENAMED
from fedllm.central.llamafactory_values import CONVERTERS
from fedllm.central.stages import STAGES, check_rows
from fedllm.config import CentralConfig, dump
from fedllm.errors import ConfigError, DataError
from fedllm.experiment import make_config

QWEN: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "output_dir": "saves/qwen3-4b/lora/sft",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
"""LLaMA-Factory's own example of fine-tuning Qwen 3."""


def problems(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as found:
        make_central(tree)
    return str(found.value)


# ours


def test_the_resolved_configuration_gives_itself() -> None:
    config = make_central({"stage": "dpo", "adapter": {"targets": ["q_proj"]}})
    assert make_central(yaml.safe_load(dump(config))) == config


def test_every_problem_is_told_at_once() -> None:
    tree = {"stage": "sftt", "adapter": {"rnk": 4}, "training": {"epochs": 1, "max_steps": 2}}
    told = problems(tree)
    assert "Did you mean 'sft'?" in told
    assert "Did you mean 'rank'?" in told
    assert "either epochs or max_steps" in told


def test_sections_of_federated_runs_are_named() -> None:
    assert "federation: is for federated runs" in problems({"stage": "sft", "federation": {}})


def test_a_federated_run_names_the_command_for_central_ones() -> None:
    with pytest.raises(ConfigError, match="fedllm train"):
        make_config({"stage": "sft"})


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"adapter": {"method": "full"}, "model": {"quantization": "4bit"}}, "cannot be trained"),
        ({"adapter": {"method": "full", "dora": True}}, "adapter.dora: is for method lora"),
        ({"adapter": {"method": "freeze", "freeze_layers": 0}}, "0 layers"),
        ({"stage": "dpo", "adapter": {"init": "pissa"}}, "no model to compare with"),
        ({"adapter": {"init": "pissa", "dora": True}}, "does not go with init: pissa"),
        ({"adapter": {"init": "pissa"}, "model": {"quantization": "8bit"}}, "needs whole weights"),
        ({"stage": "dpo", "training": {"packing": True}}, "training.packing: is for sft and pt"),
        ({"data": {"streaming": True}}, "give training.max_steps"),
        ({"data": {"streaming": True, "test_path": "x"}, "training": {"packing": True}}, "without"),
        ({"stage": "kto", "training": {"batch_size": 1}}, "give at least 2"),
        ({"stage": "grpo", "training": {"batch_size": 6}}, "does not divide the 6 answers"),
        ({"stage": "grpo", "objective": {"rewards": ["exat"]}}, "Did you mean 'exact'?"),
        ({"evaluation": {"every": 0, "best_model": True}}, "set evaluation.every"),
        ({"evaluation": {"metrics": ["los"]}}, "Did you mean 'loss'?"),
        ({"training": {"deepspeed": "nowhere.json"}}, "there is no file nowhere.json"),
        ({"training": {"fsdp_config": __file__, "fsdp": "full_shard"}}, "is not JSON"),
        ({"model": {"kind": "sequence-classification"}}, "trains a causal LM"),
    ],
)
def test_what_does_not_go_together_is_refused(tree: dict[str, Any], told: str) -> None:
    assert told in problems({"stage": "sft", **tree})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", ["lora", "freeze", "full"])
def test_every_stage_goes_with_every_method(stage: str, method: str) -> None:
    assert make_central({"stage": stage, "adapter": {"method": method}}).stage == stage


def test_rows_that_a_stage_cannot_learn_from_are_refused_with_stages_that_can() -> None:
    with pytest.raises(DataError, match="stage that fits: kto"):
        check_rows("dpo", "rated", "x.jsonl")


# LLaMA-Factory's


def map_file(tmp_path: Path, **keys: Any) -> tuple[CentralConfig, Any]:
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump({**QWEN, **keys}))
    config, found = load_central(path)
    assert found is not None
    return config, found


def test_the_example_of_llamafactory_is_accepted_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    config, found = map_file(tmp_path)
    assert config.stage == "sft"
    assert config.model.path == QWEN["model_name_or_path"]
    assert config.model.trust_remote_code
    assert config.adapter.targets == "all-linear"
    assert config.data.path == ["identity", "alpaca_en_demo"]
    assert config.data.registry == tmp_path / "data" / "dataset_info.json"
    assert config.data.max_rows_per_source == 1000
    assert config.training.epochs == 3.0
    assert config.training.warmup == 0.1
    assert config.training.precision == "bfloat16"
    assert config.training.gradient_checkpointing
    assert config.checkpoint.every == 500
    assert config.run_dir == Path("saves/qwen3-4b/lora/sft")
    assert {*found.honoured, *found.ignored} == set(QWEN)
    assert "chat template" in found.ignored["template"]


def test_a_json_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(QWEN))
    assert load_central(path)[0].data.max_length == 2048


def test_their_keys_and_ours_may_be_laid_over_their_file(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(QWEN))
    config, _ = load_central(path, ["learning_rate=1e-5", "training.seed_free=1"][:1])
    assert config.training.learning_rate == 1e-5
    config, _ = load_central(path, ["adapter.rank=2", "lora_dropout=0.5"])
    assert (config.adapter.rank, config.adapter.dropout) == (2, 0.5)


def test_a_misspelt_key_of_theirs_is_named_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_rnk: .* Did you mean 'lora_rank'"):
        map_file(tmp_path, lora_rnk=4)


def test_what_would_change_the_result_and_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        map_file(tmp_path, use_badam=True, resize_vocab=True, shift_attn=False)
    assert len(found.value.problems) == 2


@pytest.mark.parametrize(
    ("keys", "place", "value"),
    [
        ({"stage": "dpo", "pref_loss": "simpo"}, "stage", "simpo"),
        ({"stage": "dpo", "pref_loss": "ipo"}, "objective.loss", "ipo"),
        ({"quantization_bit": 4}, "model.quantization", "4bit"),
        ({"finetuning_type": "freeze"}, "adapter.method", "freeze"),
        ({"max_steps": 7}, "training.max_steps", 7),
        ({"max_steps": -1}, "training.epochs", 3.0),
        ({"lora_target": "q_proj,v_proj"}, "adapter.targets", ["q_proj", "v_proj"]),
        ({"eval_strategy": "steps", "eval_steps": 20}, "evaluation.every", 20),
        ({"save_strategy": "no"}, "checkpoint.every", 0),
        ({"val_size": 0.2}, "data.holdout", 0.2),
        ({"mix_strategy": "interleave_over"}, "data.mix", "interleave-over"),
        ({"disable_shuffling": True}, "training.shuffle", False),
        ({"disable_gradient_checkpointing": True}, "training.gradient_checkpointing", False),
        ({"optim": "adamw_torch"}, "training.optimizer", "adamw"),
        ({"warmup_steps": 12, "warmup_ratio": 0.0}, "training.warmup", 12),
        ({"adam_beta2": 0.95}, "training.betas", (0.9, 0.95)),
        ({"pissa_init": True}, "adapter.init", "pissa"),
        ({"report_to": "wandb"}, "tracking", "wandb"),
    ],
)
def test_values_that_mean_something_else_are_converted(
    tmp_path: Path, keys: dict[str, Any], place: str, value: Any
) -> None:
    found: Any = map_file(tmp_path, **keys)[0]
    for part in place.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("key", ["stage", "finetuning_type", "val_size", "report_to"])
def test_values_that_we_do_not_have_are_refused(tmp_path: Path, key: str) -> None:
    wrong = {"stage": "ppo", "finetuning_type": "oft", "val_size": 30, "report_to": "swanlab"}
    with pytest.raises(ConfigError, match=key):
        map_file(tmp_path, **{key: wrong[key]})


def test_each_key_is_in_one_table() -> None:
    tables = [set(RENAMED), set(CONVERTERS), set(IGNORED), set(REFUSED)]
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_renamed_keys_lead_to_places_that_exist() -> None:
    for key, place in RENAMED.items():
        kind: Any = CentralConfig
        for part in place.split("."):
            assert part in kind.model_fields, (key, place)
            kind = kind.model_fields[part].annotation


def test_their_own_defaults_are_kept() -> None:
    found = mapped({"model_name_or_path": "x", "dataset": "y"}, "f", Path())
    assert found.tree["training"]["learning_rate"] == 5e-5
    assert found.tree["training"]["epochs"] == 3.0
    assert found.tree["data"]["max_length"] == 2048
    assert found.tree["evaluation"]["every"] == 0
    assert found.tree["checkpoint"]["every"] == 500
