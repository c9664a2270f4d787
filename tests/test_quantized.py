"""A base in 8 and 4 bits: needs bitsandbytes (`fedllm[quant]`), which also runs on a CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_world import even_partition, peft_name, random_adapter, token_set
from tiny_models import chat_tokenizer

from fedllm.adapters import BaseDelta, name_a, name_b
from fedllm.config import ModelConfig, TrainingConfig
from fedllm.engine import CohortEngine, Resident
from fedllm.federation import BaseClient, Job, Payload, Plan, View
from fedllm.models import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None,
        reason="bitsandbytes is not installed (pip install 'fedllm[quant]')",
    ),
    pytest.mark.filterwarnings("ignore"),  # bitsandbytes warns of its own deprecations
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama whose layers are multiples of bitsandbytes' blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("blocks")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_clients_train_on_a_quantised_base_as_the_same_adapter_in_peft_does(bits, folder):
    import peft

    def load():
        config = ModelConfig(path=str(folder), quantization=bits, device="cpu", dtype="float32")
        return load_model(config, kind="causal-lm")

    plan = Plan(TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.1), rounds=1)
    data, resident = token_set(8, 320), Resident(load())
    engine = CohortEngine(resident, data, even_partition((4, 4)), plan)

    class World:
        pass

    world = World()
    world.resident = resident
    adapter = random_adapter(world)
    client = BaseClient()
    jobs = [Job(cid, Payload(0, adapter), steps=1, learning_rate=0.1) for cid in (0, 1)]
    trained = engine.train([engine.fit(job, adapter, client) for job in jobs])
    rows = np.arange(8)
    scores = engine.score([View(adapter, BaseDelta(), rows)], data)

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(adapter.modules))
    model = peft.get_peft_model(load().model, config).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for module in adapter.modules:
            for name in (name_a(module), name_b(module)):
                parameters[peft_name(name)].copy_(adapter[name])
    for row in rows:
        tokens, supervised = data.row(int(row))
        ids = torch.tensor(tokens.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, :-1]
        flags = torch.tensor(supervised[1:])
        loss = torch.nn.functional.cross_entropy(logits[flags], ids[0, 1:][flags], reduction="sum")
        assert scores.loss_sum[row] == pytest.approx(float(loss.detach()), rel=2e-2)
    for result in trained:
        assert all(torch.isfinite(t).all() for t in result.adapter.tensors.values())
        assert result.adapter.digest() != adapter.digest()
