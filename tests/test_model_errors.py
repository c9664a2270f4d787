"""Every wrong folder, hub id or wish gets one clear error; quantisation is asked for rightly."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from tiny_models import ENCODERS, NAMES, causal, classifier, config
from transformers import AutoModelForSequenceClassification

from fedllm.errors import MissingExtraError, ModelError
from fedllm.models import (
    architecture,
    estimate_size,
    load_model,
    load_tokenizer,
    loading,
    sources,
)

TinyModel = Callable[[str], Path]


def _drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("config.json"), r"no config\.json"),
        (_drop("model.safetensors"), r"no safetensors weights.*Fetch"),
        (_drop("tokenizer.json", "tokenizer_config.json"), r"load a tokenizer.*tokenizer\.json"),
        (_drop("tokenizer.json"), r"tokenizer.*tokenizer\.json"),
        (_truncate_weights, r"model\.safetensors is damaged: its tensors need \d+ bytes.*Fetch"),
        (_only_pickled, r"pickle.*import LlamaForCausalLM as M.*save_pretrained"),
        (_adapter_only, r"PEFT adapter.*base model"),
        (_missing_shard, r"incomplete: model-00002-of-00002\.safetensors is missing"),
        (_write("config.json", "{"), r"read config\.json"),
        (_write("config.json", '{"model_type": "no-such"}'), r"read config\.json.*newer"),
        (_write("tokenizer.json", "{}"), r"load a tokenizer"),
        (_change_config(num_hidden_layers=3), r"9 tensors are missing or.*Fetch"),
        (_change_config(intermediate_size=50), r"6 tensors are missing or have another shape"),
        (_change_config(num_attention_heads="four"), r"Cannot "),
    ],
)
def test_a_damaged_folder_gets_one_clear_error(
    damage: Callable[[Path], None], message: str, tiny_copy: TinyModel
) -> None:
    folder = tiny_copy("llama")
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        causal(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_without_a_vocabulary_is_an_error(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("bert")
    _drop("tokenizer.json", "tokenizer_config.json")(folder)
    with pytest.raises(ModelError, match="no vocabulary"):
        classifier(folder)


def test_a_tokenizer_larger_than_the_embedding_is_an_error(
    tiny_copy: TinyModel, tiny_model: TinyModel
) -> None:
    folder = tiny_copy("llama")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["zebra"] = 320
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"321 tokens.*embeddings for 320"):
        causal(folder)


@pytest.mark.parametrize("family", ENCODERS[:2])
def test_an_encoder_is_no_causal_lm(family: str, tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match=r"encoder.*model\.kind=sequence-classification"):
        causal(tiny_model(family))


def test_an_architecture_that_cannot_do_the_kind_is_an_error(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelError, match="is a clip model, which transformers cannot build"):
        causal(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bart"}))
    with pytest.raises(ModelError, match="an encoder-decoder"):
        causal(folder)


def test_remote_code_needs_consent(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    code = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
        causal(folder)


def test_label_count_and_names_must_agree(tiny_model: TinyModel) -> None:
    with pytest.raises(ValueError, match="2 labels but 3"):
        load_model(
            config(tiny_model("bert")),
            kind="sequence-classification",
            num_labels=2,
            label_names=NAMES,
        )


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder .*Check model\.path"):
        load_tokenizer(config(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load_tokenizer(config(tmp_path / "file"))


def test_unknown_builtin_model_lists_the_known() -> None:
    with pytest.raises(ModelError, match=r"'tinny'\. Did you mean 'tiny'\?"):
        load_tokenizer(config("builtin:tinny"))


def test_builtin_models_live_in_the_package(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.resources, "files", lambda package: tmp_path / package)
    with pytest.raises(ModelError, match="Install fedllm again"):
        load_tokenizer(config("builtin:tiny"))
    shutil.copytree(tiny_model("llama"), tmp_path / "fedllm.models" / "builtin" / "tiny")
    loaded = load_model(config("builtin:tiny"), kind="causal-lm")
    assert loaded.source == "builtin:tiny"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (hub_errors.LocalEntryNotFoundError, "hub cannot be reached.*Go online"),
        (hub_errors.RepositoryNotFoundError, "no hub model 'org/model'"),
        (hub_errors.GatedRepoError, "is gated.*hf auth login"),
        (hub_errors.RevisionNotFoundError, r"no revision 'v9'.*model\.revision"),
        (hub_errors.HFValidationError, "no hub id"),
        (OSError, "Cannot fetch 'org/model'.*local folder"),
    ],
)
def test_every_failure_of_the_hub_gets_one_clear_error(
    failure: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise failure.__new__(failure)

    monkeypatch.setattr(sources, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        causal("org/model", revision="v9")


def test_hub_weights_are_fetched_only_when_needed_and_never_pickles(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **arguments: Any) -> str:
        asked.append({"name": name, **arguments})
        return str(tiny_model("llama"))

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    estimate_size(config("org/model", revision="v1"), kind="causal-lm")
    causal("org/model", revision="v1")
    assert [item["name"] for item in asked] == ["org/model"] * 2
    assert [item["revision"] for item in asked] == ["v1"] * 2
    patterns = [" ".join(item["allow_patterns"]) for item in asked]
    assert "safetensors" not in patterns[0]
    assert "safetensors" in patterns[1]
    assert not any(".bin" in pattern for pattern in patterns)


def test_quantisation_without_bitsandbytes_names_the_extra(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedllm\[quant\]'"):
        causal(tiny_model("llama"), quantization="4bit")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantisation_spares_the_head(
    bits: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Recorder(AutoModelForSequenceClassification):
        @classmethod
        def from_pretrained(cls, *_: Any, **arguments: Any) -> Any:
            asked.update(arguments)
            raise OSError("enough")

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setitem(architecture.AUTO_CLASSES, "sequence-classification", Recorder)
    with pytest.raises(ModelError, match="enough"):
        classifier(tiny_model("distilbert"), quantization=bits)
    settings = asked["quantization_config"]
    assert (settings.load_in_4bit, settings.load_in_8bit) == (bits == "4bit", bits == "8bit")
    assert settings.llm_int8_skip_modules == ["pre_classifier", "classifier"]
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert asked["use_safetensors"] is True
