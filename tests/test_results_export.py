"""Exports: PEFT folders and merged models, never over something that exists."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from fedllm.adapters import Adapter, BaseDelta, Product, name_a, name_b
from fedllm.adapters.peft_format import save_peft
from fedllm.errors import ModelError, RunError
from fedllm.results import merge_into, new_folder, write_model

Folder = Callable[[str], Path]
TOKENS = torch.arange(3, 27).view(2, 12)
TARGET = {"llama": "model.layers.1.self_attn.v_proj", "gpt2": "transformer.h.1.mlp.c_fc"}
SHAPE = {"llama": (32, 32), "gpt2": (48, 32)}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def causal(family: str, folder: Folder, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder(family), **options).eval()


def encoder(folder: Folder) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(folder("bert"), num_labels=3).eval()


def tokenizer_of(family: str, folder: Folder) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder(family))


def adapter_for(module: str, out: int, width: int) -> Adapter:
    tensors = {name_a(module): noise(3, width, seed=1), name_b(module): noise(out, 3, seed=2)}
    return Adapter(tensors, {module: 1.5})


def delta_for(module: str, out: int, width: int, rank: int) -> BaseDelta:
    product = Product(noise(out, rank, seed=3), noise(rank, width, seed=4))
    return BaseDelta().merged(1, {module: product})


def export_merged(
    model: Any, tokenizer: Any, adapter: Adapter, folder: Path, base: BaseDelta | None = None
) -> None:
    with new_folder(folder) as temporary:
        merge_into(model, adapter, base)
        write_model(model, tokenizer, temporary)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("family", TARGET)
def test_a_merged_folder_computes_what_the_peft_folder_computes(
    family: str, rank: int, tiny_model: Folder, tmp_path: Path
) -> None:
    module, shape = TARGET[family], SHAPE[family]
    adapter, base = adapter_for(module, *shape), delta_for(module, *shape, rank=rank)
    assert bool(base.dense) == (rank == 40)
    tokenizer = tokenizer_of(family, tiny_model)
    export_merged(causal(family, tiny_model), tokenizer, adapter, tmp_path / "m", base=base)
    with new_folder(tmp_path / "p") as folder:
        save_peft(
            adapter,
            folder,
            base_model=family,
            task_type="CAUSAL_LM",
            base=base,
            conv1d_modules=[module] if family == "gpt2" else [],
        )
        tokenizer.save_pretrained(folder)
    plain = causal(family, tiny_model)
    before = logits(plain)
    peft = logits(PeftModel.from_pretrained(plain, tmp_path / "p").eval())
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval())
    assert not torch.allclose(before, peft, atol=1e-2)
    torch.testing.assert_close(merged, peft, atol=1e-5, rtol=1e-5)
    for name in ("m", "p"):
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded("Tom has 3").input_ids == tokenizer("Tom has 3").input_ids


def test_merging_adds_in_fp32_and_keeps_the_dtype(tiny_model: Folder) -> None:
    model = causal("llama", tiny_model, dtype=torch.bfloat16)
    module = TARGET["llama"]
    adapter = adapter_for(module, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    merge_into(model, adapter)
    weight = before.pop(f"{module}.weight").float() + adapter.product(module).dense()
    merged = model.get_submodule(module).weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, weight.to(torch.bfloat16))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_trained_head_replaces_the_models(tiny_model: Folder) -> None:
    model = encoder(tiny_model)
    head = {"classifier.weight": noise(3, 32, seed=5), "classifier.bias": noise(3, seed=6)}
    merge_into(model, Adapter(head))
    assert torch.equal(model.classifier.weight, head["classifier.weight"])
    assert torch.equal(model.classifier.bias, head["classifier.bias"])


def test_merging_into_a_tied_output_leaves_the_input_embedding(
    tiny_model: Folder, tmp_path: Path
) -> None:
    model = causal("qwen3", tiny_model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.clone()
    adapter = adapter_for("lm_head", *embedding.shape)
    export_merged(model, tokenizer_of("qwen3", tiny_model), adapter, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(loaded.model.embed_tokens.weight, embedding)
    expected = embedding + adapter.product("lm_head").dense()
    torch.testing.assert_close(loaded.lm_head.weight, expected)


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (adapter_for("model.layers.9.self_attn.v_proj", 32, 32), "has no 'model.layers.9"),
        (adapter_for("model.layers.1.self_attn.v_proj", 16, 32), r"\(32, 32\) .* \(16, 32\)"),
        (Adapter({"score.weight": torch.zeros(2, 32)}), r"has no 'score\.weight'"),
    ],
)
def test_a_model_the_adapter_does_not_belong_to_is_refused(
    adapter: Adapter, told: str, tiny_model: Folder, tmp_path: Path
) -> None:
    model = causal("llama", tiny_model)
    tokenizer = tokenizer_of("llama", tiny_model)
    with pytest.raises(ModelError, match=told):
        export_merged(model, tokenizer, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_weight_is_refused(tiny_model: Folder) -> None:
    model = causal("llama", tiny_model)
    layer = model.get_submodule(TARGET["llama"])
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.quantization=none"):
        merge_into(model, adapter_for(TARGET["llama"], 32, 32))


def test_an_existing_folder_is_not_overwritten(tiny_model: Folder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    adapter = adapter_for(TARGET["llama"], 32, 32)
    model, tokenizer = causal("llama", tiny_model), tokenizer_of("llama", tiny_model)
    weight = model.get_submodule(TARGET["llama"]).weight
    with pytest.raises(RunError, match="not overwritten"):
        export_merged(model, tokenizer, adapter, tmp_path / "out")
    assert model.get_submodule(TARGET["llama"]).weight is weight
    with pytest.raises(RunError, match="not overwritten"), new_folder(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        safetensors.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_no_half_export(
    failure: Exception, tiny_model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = causal("llama", tiny_model), tokenizer_of("llama", tiny_model)

    def full(*_: Any, **__: Any) -> NoReturn:
        raise failure

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(RunError, match="out: no space is left"):
        export_merged(model, tokenizer, adapter_for(TARGET["llama"], 32, 32), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
