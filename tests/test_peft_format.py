"""The exported folder does in PEFT what W + s B A + delta does in plain algebra."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from fedllm.adapters import Adapter, BaseDelta, Product, initial, name_a, name_b
from fedllm.adapters.peft_format import folded, head_module, load_peft, save_peft
from fedllm.errors import ModelError

TOKENS = torch.arange(3, 27).view(2, 12)
MODELS = {
    "llama": (transformers.AutoModelForCausalLM, "CAUSAL_LM", ("q_proj", "v_proj", "down_proj")),
    "gpt2": (transformers.AutoModelForCausalLM, "CAUSAL_LM", ("c_attn", "c_fc")),
    "bert": (transformers.AutoModelForSequenceClassification, "SEQ_CLS", ("query", "value")),
    "roberta": (transformers.AutoModelForSequenceClassification, "SEQ_CLS", ("query", "value")),
    "distilbert": (transformers.AutoModelForSequenceClassification, "SEQ_CLS", ("q_lin", "v_lin")),
}

Folder = Callable[[str], Path]


def load(family: str, folder: Folder) -> Any:
    """The model; a classification head, which the folder lacks, is the same in each call."""
    auto, task, _ = MODELS[family]
    extra = {} if task == "CAUSAL_LM" else {"num_labels": 3}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return auto.from_pretrained(folder(family), **extra).eval()


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.15


def shapes_of(model: Any, endings: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    shapes = {}
    for name, module in model.named_modules():
        if name.endswith(endings):
            rows, columns = module.weight.shape
            transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
            shapes[name] = (columns, rows) if transposed else (rows, columns)
    return shapes


def random_adapter(model: Any, endings: tuple[str, ...]) -> Adapter:
    """Ranks 2, 3, 4, 2, ... and a scaling for each module, with whatever head there is."""
    tensors, scaling = {}, {}
    for i, (module, (rows, columns)) in enumerate(shapes_of(model, endings).items()):
        rank = 2 + i % 3
        tensors[name_a(module)] = noise(rank, columns, seed=i)
        tensors[name_b(module)] = noise(rows, rank, seed=100 + i)
        scaling[module] = (2.0, 0.7)[i % 2]
    for i, (name, tensor) in enumerate(model.named_parameters()):
        if head_module(name).endswith(("classifier", "score")):
            tensors[name] = noise(*tensor.shape, seed=200 + i)
    return Adapter(tensors, scaling)


def random_base(model: Any, endings: tuple[str, ...]) -> BaseDelta:
    """A delta on every second module: low-rank ones, and one that has become dense."""
    base = BaseDelta()
    modules = dict(list(shapes_of(model, endings).items())[::2])
    for version, rank in enumerate((3, 2), start=1):
        parts = {
            m: Product(noise(o, rank, seed=version), noise(rank, i, seed=9 + version))
            for m, (o, i) in modules.items()
        }
        base = base.merged(version, parts)
    first, (out, width) = next(iter(modules.items()))
    wide = Product(noise(out, 40, seed=5), noise(40, width, seed=6))
    base = base.merged(3, {first: wide})
    assert base.dense
    assert base.products
    return base


def by_hand(model: Any, adapter: Adapter, base: BaseDelta) -> Any:
    """A copy of the model whose weights are W + s B A + delta, module by module."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for module in dict.fromkeys((*adapter.modules, *base.products, *base.dense)):
            layer = dense.get_submodule(module)
            change = torch.zeros(())
            if module in adapter.scaling:
                product = adapter[name_b(module)] @ adapter[name_a(module)]
                change = change + adapter.scaling[module] * product
            if module in base.products:
                change = change + base.products[module].dense()
            if module in base.dense:
                change = change + base.dense[module]
            transposed = isinstance(layer, transformers.pytorch_utils.Conv1D)
            layer.weight += change.T if transposed else change
        for name in adapter.heads:
            dense.get_parameter(name).copy_(adapter[name])
    return dense


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def export(adapter: Adapter, family: str, folder: Path, model: Any, **extra: Any) -> None:
    conv1d = [
        name
        for name, module in model.named_modules()
        if isinstance(module, transformers.pytorch_utils.Conv1D)
    ]
    task = MODELS[family][1]
    save_peft(adapter, folder, base_model=family, task_type=task, conv1d_modules=conv1d, **extra)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_peft_computes_what_the_dense_weights_compute(
    family: str, with_base: bool, tiny_model: Folder, tmp_path: Path
) -> None:
    model = load(family, tiny_model)
    adapter = random_adapter(model, MODELS[family][2])
    base = random_base(model, MODELS[family][2]) if with_base else BaseDelta()
    export(adapter, family, tmp_path, model, base=base)
    expected = logits(by_hand(model, adapter, base))
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_with_only_a_base_delta_exports_the_delta(
    tiny_model: Folder, tmp_path: Path
) -> None:
    model = load("llama", tiny_model)
    adapter = initial(shapes_of(model, ("q_proj",)), rank=4, scaling=2.0, seed=0)
    base = random_base(model, ("q_proj", "v_proj"))
    export(adapter, "llama", tmp_path, model, base=base)
    expected = logits(by_hand(model, adapter, base))
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4), own=st.integers(1, 6))
def test_folding_is_exact_and_never_exceeds_full_rank(ranks: list[int], own: int) -> None:
    adapter = Adapter(
        {name_a("m"): noise(own, 5, seed=1), name_b("m"): noise(7, own, seed=2)}, {"m": 0.5}
    )
    base, total = BaseDelta(), adapter.product("m").dense()
    for version, rank in enumerate(ranks):
        increment = Product(noise(7, rank, seed=version), noise(rank, 5, seed=50 + version))
        base, total = base.merged(version, {"m": increment}), total + increment.dense()
    whole = folded(adapter, base)
    assert whole.rank_of("m") <= 5
    torch.testing.assert_close(whole.product("m").dense(), total, atol=1e-5, rtol=1e-5)


def test_an_adapter_comes_back_as_it_was(tiny_model: Folder, tmp_path: Path) -> None:
    model = load("roberta", tiny_model)
    adapter = random_adapter(model, MODELS["roberta"][2])
    export(adapter, "roberta", tmp_path, model)
    loaded = load_peft(tmp_path)
    assert set(loaded) == set(adapter)
    assert all(torch.equal(loaded[name], adapter[name]) for name in adapter)
    assert loaded.scaling == pytest.approx(adapter.scaling)


def test_the_origin_is_recorded(tiny_model: Folder, tmp_path: Path) -> None:
    model = load("llama", tiny_model)
    adapter = random_adapter(model, ("q_proj",))
    export(adapter, "llama", tmp_path, model, metadata={"algorithm": "flora", "version": "3"})
    origin = json.loads((tmp_path / "fedllm.json").read_text())
    digest = adapter.digest()
    assert origin == {"algorithm": "flora", "version": "3", "adapter_sha256": digest}


def test_equal_adapters_make_equal_files(tiny_model: Folder, tmp_path: Path) -> None:
    model = load("llama", tiny_model)
    adapter = random_adapter(model, ("q_proj", "v_proj"))
    for name in ("one", "two"):
        export(adapter, "llama", tmp_path / name, model, metadata={"a": "1", "b": "2"})
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    listed = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert listed == sorted(adapter.modules)


def test_a_folder_without_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json.* is missing"):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("classifier.weight", "classifier"),
        ("classifier.dense.weight", "classifier"),
        ("pre_classifier.bias", "pre_classifier"),
        ("score.weight", "score"),
        ("model.norm.weight", "model.norm"),
    ],
)
def test_a_head_tensor_belongs_to_its_outermost_head_module(tensor: str, module: str) -> None:
    assert head_module(tensor) == module
