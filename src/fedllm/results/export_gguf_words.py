"""The vocabulary of a byte-level BPE tokenizer, as GGUF holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import ModelError
from fedllm.results.export_chat import Speech

_DIGITS_OF_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS: Mapping[str, str] = {
    _DIGITS_OF_THREE: "llama-bpe",
    _DIGITS_OF_THREE.replace("{1,3}", ""): "qwen2",
}
"""How a tokenizer cuts text into words, to llama.cpp's name for it."""
OURS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of `builtin:tiny`; llama.cpp knows none that is quite the same."""
_NEAREST: Mapping[str, str] = {OURS: "gpt-2"}
_OTHER_WAY = (
    "Export it with --merged and convert that folder with llama.cpp's convert_hf_to_gguf.py"
)


def check_words(folder: Path) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text into words.

    Raises:
        ModelError: If it is no byte-level BPE, or cuts text in a way that is not known here.
    """
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if tree.get("model", {}).get("type") != "BPE" or tree["model"].get("byte_fallback"):
        raise ModelError(
            f"fedllm converts byte-level BPE tokenizers to GGUF, and this is another. {_OTHER_WAY}"
        )
    name = _name_of(tree.get("pre_tokenizer") or {})
    if name is None or tree.get("normalizer") not in (None, {"type": "NFC"}):
        raise ModelError(
            "fedllm does not know llama.cpp's name for the way this tokenizer cuts text into words."
            f" {_OTHER_WAY}"
        )
    return name


def write_words(writer: Any, folder: Path, speech: Speech, rows: int) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        writer: A GGUFWriter.
        folder: The tokenizer's files, as `save_pretrained` writes them.
        speech: Stop tokens; the first is the end of a turn.
        rows: Rows of the embedding; those that no token has are written as unused.
    """
    import gguf

    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {entry["id"]: entry for entry in tree["added_tokens"]}
    words = {place: word for word, place in tree["model"]["vocab"].items()}
    words |= {place: entry["content"] for place, entry in added.items()}
    kinds = []
    for place in range(rows):
        if place not in words:
            kinds.append(gguf.TokenType.UNUSED)
        elif place not in added:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            is_special = added[place]["special"]
            kinds.append(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(check_words(folder))
    writer.add_token_list([words.get(place, f"[PAD{place}]") for place in range(rows)])
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    if speech.stop_ids:  # what ends a turn is what a program must stop at
        special.special_token_ids["eos"] = speech.stop_ids[0]
    special.add_special_token.setdefault("bos", _writes_bos(folder, speech))
    special.add_to_gguf(writer, quiet=True)


def _writes_bos(folder: Path, speech: Speech) -> bool:
    """Tell whether training put a beginning-of-text token first; llama.cpp then adds it."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    template = speech.template or ""
    return bool(bos) and ("bos_token" in template or str(bos) in template)


def _name_of(pre: Mapping[str, Any]) -> str | None:
    match pre:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return "gpt-2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return _PATTERNS.get(pattern) or _NEAREST.get(pattern)
        case _:
            return None
