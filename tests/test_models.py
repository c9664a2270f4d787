"""Models load frozen, silent and the same each time, with a tokenizer that can pad."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import DECODERS, ENCODERS, FAMILIES, NAMES, causal, classifier, config
from transformers import BertForMaskedLM
from transformers.utils import logging as hf_logging

import fedllm.models
from fedllm.errors import ModelError
from fedllm.models import (
    BUILTIN_MODELS,
    TESTED_FAMILIES,
    base_hash,
    estimate_size,
    head_tensors,
    load_model,
    load_tokenizer,
)
from fedllm.models.quiet import quiet

TinyModel = Callable[[str], Path]


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_loads_frozen_and_in_evaluation_mode(
    family: str, tiny_model: TinyModel
) -> None:
    loaded = causal(tiny_model(family))
    assert loaded.kind == "causal-lm"
    assert loaded.source == str(tiny_model(family))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    tokens = loaded.tokenizer("Tom has 3 apples", return_tensors="pt")
    assert loaded.model(**tokens).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_a_classifier_with_the_given_labels(
    family: str, tiny_model: TinyModel
) -> None:
    loaded = classifier(tiny_model(family))
    tokens = loaded.tokenizer("a joy to watch", return_tensors="pt")
    assert loaded.model(**tokens).logits.shape == (1, len(NAMES))
    assert loaded.model.config.id2label == dict(enumerate(NAMES))
    assert loaded.model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id


def test_tested_families_are_those_the_tiny_models_have(tiny_model: TinyModel) -> None:
    kinds = {
        json.loads((tiny_model(f) / "config.json").read_text())["model_type"] for f in FAMILIES
    }
    assert kinds == set(TESTED_FAMILIES)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "distilbert"])
def test_same_seed_gives_the_same_head_and_another_seed_another(
    family: str, tiny_model: TinyModel
) -> None:
    first, same, other = (
        classifier(tiny_model(family), seed=seed).model.state_dict() for seed in (1, 1, 2)
    )
    matrices = [
        name
        for name in head_tensors(classifier(tiny_model(family)).model, "sequence-classification")
        if first[name].ndim == 2
    ]
    assert matrices
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_head_is_the_same_in_every_dtype_up_to_rounding(tiny_model: TinyModel) -> None:
    full = classifier(tiny_model("llama")).model.get_parameter("score.weight")
    half = classifier(tiny_model("llama"), dtype="bfloat16").model.get_parameter("score.weight")
    assert half.dtype == torch.bfloat16
    assert torch.equal(full.to(torch.bfloat16), half)


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_loading_leaves_global_random_state_alone(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    before = torch.get_rng_state(), random.getstate()
    classifier(folder, seed=5)
    estimate_size(config(folder), kind="sequence-classification", num_labels=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_head_of_a_checkpoint_is_kept_when_it_fits(tiny_model: TinyModel, tmp_path: Path) -> None:
    trained = classifier(tiny_model("bert"), seed=3)
    trained.model.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    again = classifier(tmp_path, seed=4)
    assert all(
        torch.equal(tensor, again.model.state_dict()[name])
        for name, tensor in trained.model.state_dict().items()
    )
    own_labels = load_model(config(tmp_path), kind="sequence-classification")
    assert own_labels.model.config.id2label == dict(enumerate(NAMES))
    larger = load_model(config(tmp_path), kind="sequence-classification", num_labels=5)
    assert larger.model.get_parameter("classifier.weight").shape[0] == 5


def test_a_missing_pooler_is_drawn_from_the_seed_and_reported(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = BertForMaskedLM(classifier(tiny_model("bert")).model.config)  # built without a pooler
    bare.save_pretrained(tmp_path)
    load_tokenizer(config(tiny_model("bert"))).save_pretrained(tmp_path)
    first, second = (classifier(tmp_path, seed=1).model for _ in range(2))
    name = "bert.pooler.dense.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert name in caplog.text


def test_loading_says_nothing_and_restores_transformers_voice(
    tiny_model: TinyModel, capfd: pytest.CaptureFixture[str]
) -> None:
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    classifier(tiny_model("llama"))
    assert capfd.readouterr() == ("", "")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (verbosity, bars)


def test_quiet_restores_after_an_error() -> None:
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    with contextlib.suppress(KeyError), quiet():
        assert not hf_logging.is_progress_bar_enabled()
        raise KeyError
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


def test_base_hash_tells_weights_apart_and_ignores_the_head(tiny_model: TinyModel) -> None:
    before = base_hash(causal(tiny_model("llama")).model)
    loaded = causal(tiny_model("llama"))
    assert before == loaded.base_hash
    assert before != base_hash(causal(tiny_model("qwen3")).model)
    with torch.no_grad():
        loaded.model.get_parameter("model.norm.weight")[0] += 1
    assert before != base_hash(loaded.model)
    assert len({classifier(tiny_model("llama"), seed=seed).base_hash for seed in (1, 2)}) == 1


def test_base_hash_survives_wrapped_layers(tiny_model: TinyModel) -> None:
    loaded, untouched = causal(tiny_model("gpt2")), causal(tiny_model("gpt2"))
    get_peft_model(loaded.model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert loaded.base_hash == untouched.base_hash


@pytest.mark.parametrize("family", [DECODERS[0], ENCODERS[0]])
def test_a_present_padding_token_is_kept(family: str, tiny_model: TinyModel) -> None:
    assert load_tokenizer(config(tiny_model(family))).pad_token in {"<|pad|>", "[PAD]"}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], "<|im_end|>"),
        (["<|right_pad|>"], "<|right_pad|>"),
        (["<|reserved_0|>"], "<|reserved_0|>"),
        (["<|reserved_0|>", "<pad>"], "<pad>"),
        (["<|tool|>"], "<|im_end|>"),
    ],
)
def test_padding_is_an_unused_special_token_else_end_of_sequence(
    extra: list[str], expected: str, tiny_copy: TinyModel
) -> None:
    folder = tiny_copy("llama")
    settings = _without(folder / "tokenizer_config.json", "pad_token", "extra_special_tokens")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<|pad|>"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, content in enumerate(extra):
        data["added_tokens"].append(
            {"id": 320 + index, "content": content, "special": True} | flags
        )
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(config(folder))
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id not in tokenizer("plain text, no marks").input_ids


def test_no_token_to_pad_with_is_an_error(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    settings = _without(
        folder / "tokenizer_config.json", "pad_token", "eos_token", "extra_special_tokens"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"neither a padding .* Set pad_token"):
        load_tokenizer(config(folder))


def _without(file: Path, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(file.read_text()).items() if key not in keys}


def test_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; from fedllm.models import BUILTIN_MODELS; import fedllm.models.catalog;"
        "assert list(BUILTIN_MODELS); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(hasattr(fedllm.models, name) for name in fedllm.models.__all__)
    assert sorted(BUILTIN_MODELS) == ["tiny"]
    with pytest.raises(AttributeError, match="no_such"):
        _ = fedllm.models.no_such
