"""The tokenizer of a model folder, with a token to pad with."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.models.quiet import quiet
from fedllm.models.sources import locate, reported

_VOCABULARIES = ("tokenizer*", "vocab*", "*.tiktoken", "spiece*", "sentencepiece*", "tekken*")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; of the model itself nothing but small files is read.

    A tokenizer without a padding token is given one that stands for no text: an unused special
    token if it has one, else its end-of-sequence token (which is why padding must be told from
    the attention mask, never from the id).

    Raises:
        ModelError: If there is no such model, it has no tokenizer or a damaged one, or nothing
            could serve as padding.
    """
    return tokenizer_in(locate(config, weights=False), config)


def tokenizer_in(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer from a folder that `locate` found; raises as `load_tokenizer` does."""
    remedy = "Put its tokenizer files (tokenizer.json, tokenizer_config.json) into the folder."
    if not any(found for pattern in _VOCABULARIES for found in folder.glob(pattern)):
        raise ModelError(
            f"Cannot load a tokenizer from '{config.path}': it has no vocabulary. {remedy}"
        )
    with quiet(), reported(f"load a tokenizer from '{config.path}'", remedy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    # some classes come up without a vocabulary file, knowing their special tokens and no text
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise ModelError(f"'{config.path}' has a tokenizer with no vocabulary. {remedy}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding(tokenizer, config.path)
    return tokenizer


def _padding(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Choose a token to pad with: one made for it, one held in reserve, else end of sequence."""
    template = str(tokenizer.chat_template or "")
    unused = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        and token.content not in tokenizer.all_special_tokens
        and token.content not in template
    ]
    for sign in ("pad", "reserved", "unused"):
        for token in unused:
            if sign in token.lower():
                return token
    if tokenizer.eos_token is None:
        raise ModelError(
            f"The tokenizer of '{source}' has neither a padding nor an end-of-sequence token. Set"
            " pad_token or eos_token in its tokenizer_config.json."
        )
    return str(tokenizer.eos_token)
