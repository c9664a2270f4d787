"""Tiny random models of many families, in Hugging Face layout, for everybody's tests.

Hidden size 32, 2 layers, 4 heads, vocabulary 320; about 100 kB each. Weights are drawn with a
large spread, so that a wrong mask, position or scale changes the output visibly. Windows of
sliding attention are 8 tokens, shorter than what the tests feed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fedllm.config import ModelConfig
from fedllm.models import LoadedModel, load_model
from fedllm.models.quiet import quiet

HIDDEN = 32
VOCABULARY = 320
WINDOW = 8
SEED = 7

TEXTS = [
    "Tom has 3 apples and buys 4 more. How many apples does Tom have? #### 7",
    "Question: which word is the longest? Answer: the longest word is 'banana'.",
    "The film was a joy to watch, the plot was dull. positive negative",
    "<|im_start|>user\nSort these numbers: 9 2 5<|im_end|>\n<|im_start|>assistant\n2 5 9<|im_end|>",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_TWO_KV_HEADS: dict[str, Any] = {"num_key_value_heads": 2}
_WIDE_HEADS: dict[str, Any] = {**_TWO_KV_HEADS, "head_dim": 16}
_GEMMA2: dict[str, Any] = {
    **_WIDE_HEADS,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}

# family -> (configuration class, model class, what differs from _SIZES)
_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_gqa": ("LlamaConfig", "LlamaForCausalLM", _TWO_KV_HEADS),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_TWO_KV_HEADS, "sliding_window": WINDOW}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_WIDE_HEADS, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        # the caps are low enough to bend the scores of random weights
        {**_GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GEMMA2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "phi": ("PhiConfig", "PhiForCausalLM", {"partial_rotary_factor": 0.5}),
}
_ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", {}),
    # RoBERTa's positions start after its padding index, here 0
    "roberta": ("RobertaConfig", "RobertaModel", {"max_position_embeddings": 129}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"dim": HIDDEN, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
}
_RENAMED = {
    "gpt2": ("vocab_size", "initializer_range"),
    "distilbert": ("vocab_size", "max_position_embeddings", "initializer_range"),
}

DECODERS = tuple(_DECODERS)
ENCODERS = tuple(_ENCODERS)
FAMILIES = (*DECODERS, *ENCODERS)
NAMES = ("bad", "good", "so-so")
"""Labels of the classifiers that `classifier` loads."""


def build(family: str, folder: Path) -> Path:
    """Write a tiny random model with its tokenizer into the folder, and return the folder.

    Dropout is off, so that training is a function of the data alone; the same family gives the
    same bytes each time. The global random state is left as it was.
    """
    config_name, model_name, differing = (_DECODERS | _ENCODERS)[family]
    tokenizer = chat_tokenizer() if family in _DECODERS else encoder_tokenizer()
    sizes = {key: _SIZES[key] for key in _RENAMED.get(family, _SIZES)}
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.eos_token_id or tokenizer.sep_token_id,
    }
    config = getattr(transformers, config_name)(**(sizes | differing | tokens))
    for name in vars(config):
        if name.endswith(("dropout", "dropout_prob", "_pdrop")):
            setattr(config, name, 0.0)
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        model = getattr(transformers, model_name)(config)
    _disturb_constants(model)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def config(path: Path | str, **changes: Any) -> ModelConfig:
    """Configure a model in float32 on the CPU, where results can be compared closely."""
    return ModelConfig(**{"path": str(path), "dtype": "float32", "device": "cpu"} | changes)


def causal(folder: Path | str, **changes: Any) -> LoadedModel:
    """Load a decoder to write text."""
    return load_model(config(folder, **changes), kind="causal-lm")


def classifier(folder: Path | str, seed: int = 0, **changes: Any) -> LoadedModel:
    """Load any model with a head for three classes."""
    return load_model(
        config(folder, **changes), kind="sequence-classification", label_names=NAMES, seed=seed
    )


def chat_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template; a turn ends in `<|im_end|>`, the end of sequence."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|endoftext|>"],
        chat_template=CHATML,
    )


def encoder_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that puts `[CLS]` before and `[SEP]` after a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _byte_level(special)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _disturb_constants(model: torch.nn.Module) -> None:
    """Move biases and norm weights off 0 and 1, so that forgetting one of them shows."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
