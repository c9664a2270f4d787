"""Adapter targets, heads, devices, number formats and sizes are what they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from tiny_models import DECODERS, FAMILIES, NAMES, causal, classifier, config
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.models import (
    estimate_size,
    head_modules,
    head_tensors,
    linear_shape,
    position_limit,
    resolve_device,
    resolve_dtype,
    resolve_kind,
    target_modules,
)

TinyModel = Callable[[str], Path]


def _peft_layers(model: nn.Module, ending: str) -> set[str]:
    """Names of the base modules that PEFT put something of this name into."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).removesuffix(ending)
        for name, _ in model.named_modules()
        if name.endswith(ending)
    }


def _peft_targets(folder: Path, **settings: Any) -> set[str]:
    model = causal(folder).model
    fan = {"fan_in_fan_out": True} if "gpt2" in folder.name else {}
    wrapped = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **fan, **settings))
    return _peft_layers(wrapped, ".lora_A.default")


@pytest.mark.parametrize("family", DECODERS)
def test_targets_are_those_of_peft(family: str, tiny_model: TinyModel) -> None:
    model = causal(tiny_model(family)).model
    if family != "phi":  # PEFT's default for phi adds the MLP to query and value
        assert set(target_modules(model, "auto")) == _peft_targets(tiny_model(family))
    all_linear = _peft_targets(tiny_model(family), target_modules="all-linear")
    assert set(target_modules(model, "all-linear")) == all_linear


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_what_peft_trains_in_full(family: str, tiny_model: TinyModel) -> None:
    kind = "sequence-classification"
    model = classifier(tiny_model(family)).model
    ours, targets = head_tensors(model, kind), target_modules(model, "auto")
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=list(targets))
    settings.fan_in_fan_out = family == "gpt2"
    wrapped = get_peft_model(model, settings)
    in_full = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    assert in_full == set(ours)
    assert _peft_layers(wrapped, ".lora_A.default") == set(targets)


def test_causal_lm_has_no_head(tiny_model: TinyModel) -> None:
    model = causal(tiny_model("llama")).model
    assert head_modules(model, "causal-lm") == head_tensors(model, "causal-lm") == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_out_head_and_pooler(family: str, tiny_model: TinyModel) -> None:
    model = classifier(tiny_model(family)).model
    names = target_modules(model, "all-linear")
    assert set(target_modules(model, "auto")) < set(names)
    assert not [name for name in names if "classifier" in name or "score" in name]
    assert not [name for name in names if "pooler" in name]
    order = [name for name, _ in model.named_modules() if name in names]
    assert list(names) == order


def test_a_name_matches_by_last_part_or_dotted_end(tiny_model: TinyModel) -> None:
    model = causal(tiny_model("llama")).model
    one = "model.layers.1.self_attn.k_proj"
    assert target_modules(model, ["1.self_attn.k_proj"]) == (one,)
    assert target_modules(model, [one]) == (one,)
    assert len(target_modules(model, ["k_proj"])) == 2
    assert len(target_modules(model, ["self_attn.k_proj", "down_proj"])) == 4


def test_an_unmatched_name_gets_a_suggestion(tiny_model: TinyModel) -> None:
    model = causal(tiny_model("llama")).model
    with pytest.raises(ModelError, match=r"'q_prj'\. Did you mean 'q_proj'\?.*down_proj"):
        target_modules(model, ["v_proj", "q_prj"])
    with pytest.raises(ModelError, match="'proj'"):
        target_modules(model, ["proj"])
    with pytest.raises(ModelError, match="finds no layer"):
        target_modules(model, [])
    with pytest.raises(ModelError, match="'score'"):
        target_modules(classifier(tiny_model("llama")).model, ["score"])


def test_auto_lists_linear_layers_when_it_knows_none(tiny_model: TinyModel) -> None:
    model = causal(tiny_model("llama")).model
    for layer in model.get_submodule("model.layers").children():
        attention = layer.get_submodule("self_attn")
        for name in ("q_proj", "v_proj"):
            attention.add_module(name.replace("_proj", "_odd"), attention.get_submodule(name))
            delattr(attention, name)
    with pytest.raises(ModelError, match=r"auto.*LlamaForCausalLM.*k_proj.*q_odd"):
        target_modules(model, "auto")


def test_auto_leaves_out_the_eyes_of_a_multimodal_model(tiny_model: TinyModel) -> None:
    model = causal(tiny_model("llama")).model
    before = target_modules(model, "auto")
    model.add_module("vision_tower", nn.ModuleDict({"q_proj": nn.Linear(2, 2)}))
    assert target_modules(model, "auto") == before


@given(
    chosen=st.lists(
        st.sampled_from(["q_proj", "k_proj", "down_proj", "0.mlp.up_proj", "1.self_attn.o_proj"]),
        min_size=1,
        unique=True,
    )
)
def test_targets_are_the_union_of_each_name_in_model_order(
    chosen: list[str], tiny_model: TinyModel
) -> None:
    model = causal(tiny_model("llama")).model
    union = {found for name in chosen for found in target_modules(model, [name])}
    ordered = tuple(name for name, _ in model.named_modules() if name in union)
    assert target_modules(model, chosen) == ordered


def test_linear_shape_is_in_then_out() -> None:
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(Conv1D(5, 3)) == (3, 5)
    assert linear_shape(nn.Embedding(3, 5)) is None


def test_device_names_resolve_or_list_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "gpu", "meta"):
        with pytest.raises(ModelError, match=rf"'{name}' is not available.*auto, cpu"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match=r"'cuda:2' is not.*cpu, cuda:0, cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_auto_dtype_on_a_cpu_follows_its_instructions(
    avx512: bool, amx: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert resolve_dtype("auto", cpu) == expected


def test_auto_dtype_without_probes_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_on_cuda_wants_native_bfloat16(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert str(resolve_dtype("auto", torch.device("cuda:0"))) == f"torch.{expected}"


def test_dtype_names_resolve(tiny_model: TinyModel) -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("float16", cpu) == torch.float16
    with pytest.raises(ModelError, match=r"'half'.*auto, float32, bfloat16, float16"):
        resolve_dtype("half", cpu)
    loaded = causal(tiny_model("llama"), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_kind_follows_the_task_unless_given() -> None:
    assert resolve_kind(ModelConfig(), "classification") == "sequence-classification"
    assert resolve_kind(ModelConfig(), "math") == "causal-lm"
    assert resolve_kind(ModelConfig(kind="causal-lm"), "classification") == "causal-lm"


@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_sizes_are_those_of_the_loaded_model(family: str, tiny_model: TinyModel) -> None:
    loaded = classifier(tiny_model(family))
    size = estimate_size(
        config(tiny_model(family)),
        kind="sequence-classification",
        num_labels=len(NAMES),
        targets="all-linear",
        rank=3,
    )
    held = {name: item.numel() for name, item in loaded.model.named_parameters()}
    head = sum(held[name] for name in head_tensors(loaded.model, loaded.kind))
    assert size.architecture == type(loaded.model).__name__
    assert (size.parameters, size.head_parameters) == (sum(held.values()) - head, head)
    assert size.base_bytes == 4 * sum(held.values())
    assert size.position_limit == position_limit(loaded.model)
    assert size.target_names == target_modules(loaded.model, "all-linear")
    fan = family == "gpt2"
    peft = LoraConfig(r=3, target_modules=list(size.target_names), fan_in_fan_out=fan)
    wrapped = get_peft_model(loaded.model, peft)
    lora = sum(item.numel() for item in wrapped.parameters() if item.requires_grad)
    assert size.adapter_parameters == lora


def test_dtype_and_quantisation_shrink_the_estimate(
    tiny_copy: TinyModel, tiny_model: TinyModel
) -> None:
    folder = tiny_copy("qwen3")
    (folder / "model.safetensors").unlink()  # an estimate reads no weights
    choices: list[dict[str, Any]] = [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "quantization": "8bit"},
        {"dtype": "bfloat16", "quantization": "4bit"},
    ]
    sizes = [
        estimate_size(config(folder, **choice), kind="causal-lm").base_bytes for choice in choices
    ]
    held = causal(tiny_model("qwen3")).model  # its output embedding is tied, and counted once
    assert sizes[0] == 4 * sum(parameter.numel() for parameter in held.parameters())
    assert sizes[0] == 2 * sizes[1]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


@pytest.mark.parametrize(
    ("family", "limit"), [("gpt2", 128), ("bert", 128), ("roberta", 128), ("llama", None)]
)
def test_position_limit_is_where_longer_input_fails(
    family: str, limit: int | None, tiny_model: TinyModel
) -> None:
    model = classifier(tiny_model(family)).model
    assert position_limit(model) == limit
    tokens = torch.full((1, limit or 200), 9)
    assert model(tokens).logits.isfinite().all()
    if limit:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 9))
