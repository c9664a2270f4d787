"""Keys of LLaMA-Factory's whose values mean something else here. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Mapped:
    """A file of LLaMA-Factory's as a tree of ours, and what became of its keys."""

    tree: dict[str, Any] = field(default_factory=dict)
    honoured: dict[str, str] = field(default_factory=dict)
    """Their key to what it sets here."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Their key to why it has no effect."""

    def put(self, key: str, place: str, value: Any) -> None:
        """Set a value at a place such as `training.batch_size`."""
        *parents, last = place.split(".")
        node = self.tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
        told = self.honoured.get(key)
        self.honoured[key] = place if told in (None, place) else f"{told}, {place}"


Converter = Callable[[Mapped, Mapping[str, Any], Path], str | None]


def _stage(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    stage, loss = tree["stage"], tree.get("pref_loss", "sigmoid")
    if stage == "ppo":
        return "ppo has no maintained trainer; see stage grpo and objective.rewards"
    found.put("stage", "stage", loss if stage == "dpo" and loss in ("orpo", "simpo") else stage)
    if stage == "dpo" and loss not in ("orpo", "simpo"):
        if loss == "kto_pair":
            return "pref_loss kto_pair is gone from TRL; use stage kto"
        found.put("pref_loss", "objective.loss", loss)
    elif "pref_loss" in tree:
        found.honoured["pref_loss"] = "stage"
    return None


def _dataset(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    place = Path(str(tree.get("dataset_dir") or "data"))
    given = str(tree.get("dataset_dir", ""))
    if given == "ONLINE" or given.startswith("REMOTE:"):
        if given != "ONLINE":
            return f"dataset_dir {given}: remote registries are not read; copy it here"
        found.put("dataset", "data.path", _names(tree["dataset"]))
        return None
    if not place.exists() and (folder / place).exists():
        place = folder / place
    found.put("dataset", "data.path", _names(tree["dataset"]))
    key = "dataset_dir" if given else "dataset"
    found.put(key, "data.registry", str(place / "dataset_info.json"))
    return None


def _names(words: Any) -> list[str]:
    return [w.strip() for w in (words.split(",") if isinstance(words, str) else map(str, words))]


def _eval_dataset(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    (*more, name) = _names(tree["eval_dataset"])
    if more:
        return "one test set is evaluated; name one"
    found.put("eval_dataset", "data.test_path", name)
    return None


def _output_dir(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    path = Path(str(tree["output_dir"]))
    found.put("output_dir", "output_dir", str(path.parent))
    found.put("output_dir", "name", re.sub(r"[^A-Za-z0-9._-]", "-", path.name) or "central")
    return None


def _finetuning_type(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    if tree["finetuning_type"] == "oft":
        return "oft is not offered; choose lora, freeze or full"
    found.put("finetuning_type", "adapter.method", tree["finetuning_type"])
    return None


def _lora_target(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    names = _names(tree["lora_target"])
    found.put("lora_target", "adapter.targets", "all-linear" if names == ["all"] else names)
    return None


def _quantization_bit(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    if tree["quantization_bit"] not in (4, 8):
        return f"{tree['quantization_bit']} bits are not offered; choose 4 or 8"
    found.put("quantization_bit", "model.quantization", f"{tree['quantization_bit']}bit")
    return None


def _flag(key: str, place: str, on: Any, off: Any = None) -> Converter:
    """Return a converter of a boolean key."""

    def convert(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
        if tree[key]:
            found.put(key, place, on)
        elif off is not None:
            found.put(key, place, off)
        else:
            found.ignored[key] = "off"
        return None

    return convert


def _optim(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    name = str(tree["optim"])
    found.put("optim", "training.optimizer", "adamw" if name == "adamw_torch" else name)
    return None


def _warmup(key: str) -> Converter:
    def convert(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
        if tree[key] or "warmup" not in found.tree.get("training", {}):
            found.put(key, "training.warmup", tree[key])
        return None

    return convert


def _every(key: str, section: str) -> Converter:
    """Return a converter of `eval_strategy` and `save_strategy`, with their steps."""

    def convert(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
        steps = tree.get(f"{key}_steps")
        strategy = str(tree.get(f"{key}_strategy") or ("steps" if key == "save" else "no"))
        every = {"no": 0, "epoch": "epoch", "steps": int(steps or 500)}.get(strategy)
        if every is None:
            return f"{strategy} is not one of no, epoch, steps"
        name = f"{key}_strategy" if f"{key}_strategy" in tree else f"{key}_steps"
        found.put(name, f"{section}.every", every)
        if f"{key}_steps" in tree:
            found.honoured[f"{key}_steps"] = f"{section}.every"
        return None

    return convert


def _report_to(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    (*more, name) = _names(tree["report_to"]) or ["none"]
    if more or name not in ("none", "tensorboard", "wandb", "trackio"):
        return f"{tree['report_to']!r}: choose one of none, tensorboard, wandb, trackio"
    found.put("report_to", "tracking", name)
    return None


def _val_size(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    size = float(tree["val_size"])
    if size == 0:
        found.ignored["val_size"] = "rows are held out for the evaluation at the end all the same"
        return None
    if size >= 1:
        return f"{tree['val_size']}: give the share of the rows that is held out, such as 0.1"
    found.put("val_size", "data.holdout", size)
    return None


def _mix(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    name = str(tree["mix_strategy"])
    known = {"concat": "concat", "interleave_under": "interleave-under",
             "interleave_over": "interleave-over"}  # fmt: skip
    if name not in known:
        return f"{name} is not offered; choose one of {', '.join(known)}"
    found.put("mix_strategy", "data.mix", known[name])
    return None


def _probabilities(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    shares = [float(share) for share in _names(tree["interleave_probs"])]
    found.put("interleave_probs", "data.mix_weights", shares)
    return None


def _betas(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    pair = [tree.get("adam_beta1") or 0.9, tree.get("adam_beta2") or 0.999]
    for key in ("adam_beta1", "adam_beta2"):
        if key in tree:
            found.put(key, "training.betas", pair)
    return None


def _template(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    found.ignored["template"] = (
        f"'{tree['template']}': the tokenizer's own chat template is used; where it has none, see"
        " model.chat_template"
    )
    return None


def _run_name(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    found.ignored["run_name"] = "a run is called by its folder"
    return None


def _fsdp_config(found: Mapped, tree: Mapping[str, Any], folder: Path) -> str | None:
    if not isinstance(tree["fsdp_config"], str):
        return "give the path of a JSON file"
    found.put("fsdp_config", "training.fsdp_config", tree["fsdp_config"])
    return None


CONVERTERS: Mapping[str, Converter] = {
    "stage": _stage,
    "pref_loss": lambda found, tree, folder: None,  # with the stage
    "dataset": _dataset,
    "dataset_dir": lambda found, tree, folder: None,  # with the data sets
    "eval_dataset": _eval_dataset,
    "output_dir": _output_dir,
    "run_name": _run_name,
    "finetuning_type": _finetuning_type,
    "lora_target": _lora_target,
    "pissa_init": _flag("pissa_init", "adapter.init", "pissa"),
    "quantization_bit": _quantization_bit,
    "bf16": _flag("bf16", "training.precision", "bfloat16"),
    "fp16": _flag("fp16", "training.precision", "float16"),
    "pure_bf16": _flag("pure_bf16", "model.dtype", "bfloat16"),
    "optim": _optim,
    "warmup_ratio": _warmup("warmup_ratio"),
    "warmup_steps": _warmup("warmup_steps"),
    "eval_strategy": _every("eval", "evaluation"),
    "eval_steps": _every("eval", "evaluation"),
    "save_strategy": _every("save", "checkpoint"),
    "save_steps": _every("save", "checkpoint"),
    "report_to": _report_to,
    "val_size": _val_size,
    "mix_strategy": _mix,
    "interleave_probs": _probabilities,
    "adam_beta1": _betas,
    "adam_beta2": _betas,
    "disable_shuffling": _flag("disable_shuffling", "training.shuffle", False, True),
    "disable_gradient_checkpointing": _flag(
        "disable_gradient_checkpointing", "training.gradient_checkpointing", False, True
    ),
    "use_cpu": _flag("use_cpu", "model.device", "cpu"),
    "template": _template,
    "enable_thinking": lambda found, tree, folder: found.ignored.update(
        enable_thinking="the tokenizer's own template decides"
    ),
    "fsdp_config": _fsdp_config,
}
"""Their key to what it becomes; each returns what is wrong with the value, if anything."""
