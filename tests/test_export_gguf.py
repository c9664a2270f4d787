"""GGUF files: read back tensor by tensor, and by transformers' own reader as an oracle."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_models import causal
from tokenizers import Regex, pre_tokenizers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fedllm.config import ModelConfig
from fedllm.errors import MissingExtraError, ModelError
from fedllm.models import load_tokenizer
from fedllm.models.quiet import quiet
from fedllm.results.export_chat import speech_of
from fedllm.results.export_gguf import (
    check_gguf,
    converted,
    load_gguf,
    verify_gguf,
    write_gguf,
)
from fedllm.results.export_gguf_words import OURS, check_words

Folder = Callable[[str], Path]
TOKENS = torch.arange(3, 27).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits.float()
        return found


def written(folder: Path, file: Path, kind: Any = "f32") -> Any:
    loaded = causal(folder)
    speech = speech_of(loaded.model, loaded.tokenizer, str(loaded.tokenizer.chat_template))
    write_gguf(loaded.model, folder, speech, file, kind)
    return loaded


def qwen(name: str, source: Path, folder: Path) -> Path:
    """Write a tiny Qwen2 (with biases) or Qwen3 (transformers' reader wants heads of 128)."""
    config = json.loads((source / "config.json").read_text())
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    more = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    sizes = {key: config[key] for key in (*keep, *more)}
    sizes |= {"head_dim": 128} if name == "3" else {}
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        kind = getattr(transformers, f"Qwen{name}Config")
        tokens = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
        model = getattr(transformers, f"Qwen{name}ForCausalLM")(kind(**sizes, **tokens))
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.data.normal_()
    with quiet():
        model.save_pretrained(folder)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.filterwarnings("ignore")  # of transformers' reader
@pytest.mark.parametrize("family", ["llama", "llama_gqa", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(family: str, tiny_model: Folder, tmp_path: Path) -> None:
    if family.startswith("qwen"):
        folder = qwen(family[-1], tiny_model("llama_gqa"), tmp_path / family)
    else:
        folder = tiny_model(family)
    loaded = written(folder, tmp_path / "m.gguf")
    with quiet():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    torch.testing.assert_close(logits(again.eval()), logits(loaded.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
def test_the_file_loads_back_into_the_weights_it_was_made_from(
    family: str, tiny_model: Folder, tmp_path: Path
) -> None:
    loaded = written(tiny_model(family), tmp_path / "m.gguf")
    other = causal(tiny_model(family)).model
    for parameter in other.parameters():
        parameter.data.zero_()
    load_gguf(other, tmp_path / "m.gguf")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "most"), [("f32", 0.0), ("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 4e-3)]
)
def test_every_tensor_is_within_what_its_format_rounds(
    kind: Any, most: float, tiny_model: Folder, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    loaded = written(tiny_model("llama"), file, kind)
    found = verify_gguf(loaded.model, file, kind)
    assert found <= most
    assert found > 0 or kind == "f32"
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    assert kinds["output_norm.weight"] == "F32"


def test_a_changed_tensor_fails_the_verification(tiny_model: Folder, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    loaded = written(tiny_model("llama"), file)
    loaded.model.model.layers[0].mlp.up_proj.weight.data[1, 2] += 0.01
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight' is off by 0\.01"):
        verify_gguf(loaded.model, file, "f32")


def test_tokens_template_and_sizes_are_in_the_file(tiny_model: Folder, tmp_path: Path) -> None:
    loaded = written(tiny_model("llama"), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields

    def value(key: str) -> Any:
        return fields[key].contents()

    vocabulary = loaded.tokenizer.get_vocab()
    words = value("tokenizer.ggml.tokens")
    assert {word: place for place, word in enumerate(words)} == vocabulary
    assert value("tokenizer.ggml.model") == "gpt2"
    assert value("tokenizer.ggml.pre") == "gpt-2"
    assert value("tokenizer.chat_template") == loaded.tokenizer.chat_template
    assert words[value("tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert value("llama.context_length") == 128
    assert value("llama.attention.head_count_kv") == 4
    kinds = value("tokenizer.ggml.token_type")
    assert kinds[vocabulary["<|im_end|>"]] == gguf.TokenType.CONTROL
    assert kinds[vocabulary["a"]] == gguf.TokenType.NORMAL
    merges = json.loads((tiny_model("llama") / "tokenizer.json").read_text())["model"]["merges"]
    assert value("tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]


def test_stretched_positions_are_divided_as_transformers_does(
    tiny_copy: Folder, tmp_path: Path
) -> None:
    folder = tiny_copy("llama")
    file = folder / "config.json"
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))
    model = causal(folder).model
    factors = dict(converted(model))["rope_freqs.weight"]
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1 / 500.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / factors, inverse.numpy(), rtol=1e-6)
    assert len(set(factors.tolist())) > 1


def test_the_built_in_tokenizer_cuts_text_as_the_name_in_the_file_does() -> None:

    tokenizer: Any = load_tokenizer(ModelConfig(path="builtin:tiny"))
    backend = tokenizer.backend_tokenizer
    texts = ["don't say 1234, it's 56!  twice\n\n\tover", "a  b 7x8 'quoted' 3.14", "über 99%"]
    ours = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert OURS in backend.to_str().replace("\\\\", "\\")
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert [backend.encode(text, add_special_tokens=False).ids for text in texts] == ours


@pytest.mark.parametrize("family", ["gemma", "gpt2", "mistral"])
def test_another_architecture_is_referred_to_llama_cpp(family: str, tiny_model: Folder) -> None:
    model = causal(tiny_model(family)).model
    with pytest.raises(ModelError, match=r"converts llama, qwen2, qwen3.*convert_hf_to_gguf\.py"):
        check_gguf(model.config.model_type, model.config)


def test_another_tokenizer_is_referred_to_llama_cpp(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=r"cuts text into words.*convert_hf_to_gguf\.py"):
        check_words(folder)
    tree["model"]["type"] = "Unigram"
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="byte-level BPE"):
        check_words(folder)


def test_without_the_library_the_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"fedllm\[gguf\]"):
        check_gguf("llama", None)
