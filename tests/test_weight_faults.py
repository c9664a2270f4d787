"""Damaged, ambiguous and dangerous weights: each gets one error that names file and tensor."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from tiny_models import causal, classifier

from fedllm.adapters import Adapter, name_a, name_b
from fedllm.adapters.peft_format import load_peft, save_peft
from fedllm.errors import ModelError
from fedllm.models.values import is_finite
from fedllm.results.export_merge import merge_adapter
from fedllm.weights import read_header

TinyModel = Callable[[str], Path]
WEIGHTS = "model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def change(file: Path, by: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    by(tensors)
    save_file(tensors, file, {"format": "pt"})


def shard(folder: Path, **places: str) -> Path:
    """Divide the weights over two files; `places` lays names over the index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[:5]}
    rest = {name: tensors[name] for name in names[5:]}
    index = {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(rest, "b.safetensors")}
    save_file(first, folder / "a.safetensors", {"format": "pt"})
    save_file(rest, folder / "b.safetensors", {"format": "pt"})
    file = folder / f"{WEIGHTS}.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": index | places}))
    return file


def fails(folder: Path, *told: str) -> None:
    with pytest.raises(ModelError) as caught:
        causal(folder)
    message = str(caught.value)
    assert "\n" not in message
    for text in told:
        assert text in message


# the base model


def test_shards_that_are_in_order_load_as_one_file_does(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    before = causal(folder).base_hash
    shard(folder)
    assert causal(folder).base_hash == before


def test_a_tensor_in_two_shards_is_refused(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    shard(folder)
    change(folder / "b.safetensors", lambda t: t.update({"lm_head.weight": torch.zeros(320, 32)}))
    fails(folder, "'lm_head.weight' stands in", "a.safetensors", "b.safetensors too")


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("c.safetensors", "c.safetensors is missing"),
        ("pytorch_model-00001.bin", "names 'pytorch_model-00001.bin', which is no safetensors"),
        ("../a.safetensors", "names '../a.safetensors', which is no safetensors file beside it"),
        ("b.safetensors", "disagree on where lm_head.weight stands"),
    ],
)
def test_an_index_that_leads_astray_is_refused(place: str, told: str, tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    shard(folder, **{"lm_head.weight": place})
    fails(folder, told)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(text: str, tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    shard(folder).write_text(text)
    fails(folder, "index.json", "no index of weights")


def test_weights_that_the_index_does_not_know_are_refused(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    shard(folder)
    change(folder / "b.safetensors", lambda t: t.update({"extra.weight": torch.zeros(2)}))
    fails(folder, "disagree on where extra.weight stands")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.weight"][3, 4] = value

    change(folder / WEIGHTS, spoil)
    fails(folder, WEIGHTS, f"'{MODULE}.weight' has 1 values that are NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finiteness_is_of_the_values_and_not_of_their_sum(dtype: torch.dtype) -> None:
    large = torch.full((4096,), 60000.0).to(dtype)
    assert is_finite(large)  # in fp16 the sum is not
    large[17] = float("-inf")
    assert not is_finite(large)
    assert not is_finite(torch.tensor([1.0, float("nan")], dtype=dtype))
    assert is_finite(torch.tensor([1, 2]))


def test_a_missing_tensor_is_named(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    change(folder / WEIGHTS, lambda t: t.__delitem__(f"{MODULE}.weight"))
    fails(folder, "1 tensors are missing", f"{MODULE}.weight is missing")


def test_a_wrong_shape_is_told_with_the_right_one(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    change(folder / WEIGHTS, lambda t: t.update({f"{MODULE}.weight": torch.zeros(16, 32)}))
    fails(folder, f"{MODULE}.weight in {WEIGHTS} has (16, 32), not (32, 32)")


def test_a_tensor_without_a_place_is_refused_and_not_left_out(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    fails(folder, "9 tensors that a LlamaForCausalLM", "no place for (model.layers.1.")


def test_another_kinds_head_is_left_out_of_a_classifier(tiny_model: TinyModel) -> None:
    assert classifier(tiny_model("llama")).kind == "sequence-classification"


def test_whole_numbers_are_no_weights(tiny_copy: TinyModel) -> None:
    folder = tiny_copy("llama")
    change(
        folder / WEIGHTS,
        lambda t: t.update({f"{MODULE}.weight": torch.zeros(32, 32, dtype=torch.int64)}),
    )
    fails(folder, WEIGHTS, f"'{MODULE}.weight' is stored as I64, where a weight is")


def test_a_pickle_is_refused_and_its_code_never_runs(tiny_copy: TinyModel, tmp_path: Path) -> None:
    folder, trace = tiny_copy("llama"), tmp_path / "ran"
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trace)))
    fails(folder, "only as a pickle (pytorch_model.bin)", "safetensors only")
    assert not trace.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trace.exists()  # the trap works


def test_a_pickle_under_a_safetensors_name_is_refused(tiny_copy: TinyModel, tmp_path: Path) -> None:
    folder, trace = tiny_copy("llama"), tmp_path / "ran"
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap(trace)) * 20)
    fails(folder, f"{WEIGHTS} is damaged")
    assert not trace.exists()


# files


def header_of(tree: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(tree)) + tree.encode() + body


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is damaged"),
        (b"\0" * 8, "no safetensors file"),
        (struct.pack("<Q", 2**60) + b"{}", "is damaged"),
        (header_of("[1]"), "no safetensors file"),
        (
            header_of(
                '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
                ' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
                b"x",
            ),
            "names the tensor 'a' twice",
        ),
        (
            header_of('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"),
            r"'a', F32 of shape \(2,\), has 4 bytes",
        ),
        (header_of('{"a": {"dtype": "F32"}}'), "nothing sensible of the tensor 'a'"),
        (
            header_of('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"xy"),
            "need .* bytes and it has",
        ),
    ],
)
def test_a_file_that_is_not_whole_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=told):
        read_header(file)


@given(cut=st.integers(1, 400))
def test_a_file_cut_off_anywhere_is_refused(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = save({"a": torch.ones(3, 4), "b": torch.zeros(7, dtype=torch.bfloat16)})
    file = tmp_path_factory.mktemp("cut") / "x.safetensors"
    file.write_bytes(whole)
    assert read_header(file)["a"].shape == (3, 4)
    file.write_bytes(whole[: max(len(whole) - cut, 0)])
    with pytest.raises(ModelError):
        read_header(file)


# adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name_a(MODULE): torch.randn(2, 32, generator=generator),
        name_b(MODULE): torch.randn(32, 2, generator=generator),
    }
    folder = tmp_path / "adapter"
    save_peft(Adapter(tensors, {MODULE: 2.0}), folder, base_model="x", task_type="CAUSAL_LM")
    return folder


FILE = "adapter_model.safetensors"
A, B = (f"base_model.model.{MODULE}.lora_{letter}.weight" for letter in "AB")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        def by(tensors: dict[str, torch.Tensor]) -> None:
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor

        change(folder / FILE, by)

    return spoil


def cut(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, rf"{FILE} is damaged"),
        (spoil_tensor(B, None), rf"lora_A\.weight' is there and .*{MODULE}\.lora_B.* is missing"),
        (spoil_tensor("other.weight", torch.ones(2)), r"unexpected tensor 'other\.weight'"),
        (spoil_tensor(A, torch.ones(3, 32)), rf"factors of '{MODULE}'.*\(32, 2\) and \(3, 32\)"),
        (spoil_tensor(A, torch.full((2, 32), float("nan"))), "NaN or infinite"),
        (spoil_tensor(A, torch.ones(2, 32, dtype=torch.int32)), "is stored as I32"),
        (lambda f: edit_config(f, target_modules=["k_proj"]), "k_proj is missing"),
        (lambda f: edit_config(f, peft_type="IA3"), "kind 'IA3'"),
        (lambda f: (f / "adapter_config.json").write_text("{") and None, "is not JSON"),
    ],
)
def test_a_damaged_adapter_gets_one_clear_error(
    damage: Callable[[Path], None], told: str, adapter: Path, tiny_model: TinyModel
) -> None:
    damage(adapter)
    with pytest.raises(ModelError, match=told):
        load_peft(adapter)
    with pytest.raises(ModelError, match=told):
        merge_adapter(causal(tiny_model("llama")).model, adapter)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda f: [
                spoil_tensor(A, torch.ones(2, 16))(f),
                spoil_tensor(B, torch.ones(16, 2))(f),
            ],
            rf"'{MODULE}' is for a weight of shape \(16, 16\).*\(32, 32\)",
        ),
        (
            lambda f: edit_config(f, target_modules=["q_proj"]),
            r"lacks .*layers\.1\.self_attn\.q_proj\.lora_A",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(
    damage: Callable[[Path], object], told: str, adapter: Path, tiny_model: TinyModel
) -> None:
    damage(adapter)
    with pytest.raises(ModelError, match=told):
        merge_adapter(causal(tiny_model("llama")).model, adapter)


def test_an_adapter_of_another_model_is_refused(adapter: Path, tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match=f"GPT2LMHeadModel has no '{MODULE}'"):
        merge_adapter(causal(tiny_model("gpt2")).model, adapter)


def test_a_pickled_adapter_is_refused_and_never_opened(adapter: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (adapter / FILE).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(ModelError, match=r"only as a pickle \(adapter_model\.bin\)"):
        load_peft(adapter)
    shutil.rmtree(adapter)
    assert not trace.exists()
