"""On a 4-bit base exact methods stay exact: what is merged never has to be rounded into it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance.cases import CASES, Case
from engine_world import even_partition, token_set
from torch import Tensor

from fedllm.adapters import Adapter, BaseDelta
from fedllm.algorithms import make
from fedllm.config import ModelConfig, TrainingConfig
from fedllm.engine import CohortEngine, Resident
from fedllm.engine.packing import segments
from fedllm.executors import InlineExecutor
from fedllm.federation import Job, Part, Plan, Update, visible
from fedllm.models import load_model
from fedllm.system import RankRule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None,
        reason="bitsandbytes is not installed (pip install 'fedllm[quant]')",
    ),
    pytest.mark.filterwarnings("ignore"),  # bitsandbytes warns of its own deprecations
]

SIZES = (4, 8, 2)
EXACT = [case for case in CASES if case.exact]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> CohortEngine:
    """An engine over a Llama in 4 bits, whose layers are multiples of bitsandbytes' blocks."""
    from tiny_models import chat_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    path: Path = tmp_path_factory.mktemp("blocks")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    model = ModelConfig(path=str(path), quantization="4bit", device="cpu", dtype="float32")
    resident = Resident(load_model(model, kind="causal-lm"))
    plan = Plan(TrainingConfig(batch_size=4, optimizer="sgd", learning_rate=0.5), rounds=3)
    return CohortEngine(resident, token_set(sum(SIZES), 320), even_partition(SIZES), plan)


def outputs(engine: CohortEngine, adapter: Adapter, base: BaseDelta) -> dict[str, Tensor]:
    """Return what each adapted layer computes for the same inputs."""
    stream = torch.Generator().manual_seed(1)
    found = {}
    for layer, (_, columns) in engine.resident.shapes.items():
        x = torch.randn(5, columns, generator=stream)
        active = engine.activate([adapter], base)
        active.by_sequence = segments(torch.zeros(1).long().numpy(), torch.tensor([5]).numpy())
        active.by_token = active.by_sequence
        with torch.no_grad(), engine.resident.using(active):
            found[layer] = engine.resident.model.get_submodule(layer)(x)
    return found


def trained(job: Job, update: Update) -> Adapter:
    """Return what a client's training ended with."""
    download = job.payload.adapter
    moved = {**update.adapter.tensors, **visible(update.state)}
    own = download.overlaid({n: t for n, t in moved.items() if n in download})
    return replace(own, scaling={**own.scaling, **update.adapter.scaling})


def jobs_of(server: object, engine: CohortEngine, version: int) -> Sequence[Job]:
    """Return complete jobs for all clients."""
    made = server.local_run(range(len(SIZES)))  # type: ignore[attr-defined]
    rest = {"steps": 2, "learning_rate": 0.5}
    return [
        replace(job, seed=100 * version + job.cid, num_samples=SIZES[job.cid], **rest)
        for job in made
    ]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_the_global_view_is_the_mean_of_what_clients_trained(
    case: Case, engine: CohortEngine
) -> None:
    server, client = make(case.name, case.settings)
    resident = engine.resident
    server.start(
        resident.initial_adapter(4, 2.0, 0),
        RankRule((4,)),
        num_clients=len(SIZES),
        rounds=3,
        weight_of=resident.base_weight,
    )
    moved = False
    for version in range(3):
        jobs = jobs_of(server, engine, version)
        updates = InlineExecutor(engine, client).run(jobs)
        before = outputs(engine, server.view().adapter, server.base)
        ideal: dict[str, Tensor] = {}
        for job, update in zip(jobs, updates, strict=True):
            share = SIZES[job.cid] / sum(SIZES)
            own = outputs(engine, trained(job, update), job.payload.base)
            ideal = {n: ideal.get(n, torch.zeros(())) + share * t for n, t in own.items()}
        server.apply([Part(server.weight(u), u) for u in updates])
        after = outputs(engine, server.view().adapter, server.base)
        for layer, wanted in ideal.items():
            moved = moved or float((wanted - before[layer]).norm()) > 1e-4
            torch.testing.assert_close(after[layer], wanted, atol=2e-5, rtol=1e-4)
    assert moved


def test_the_base_weight_is_what_the_layer_multiplies_with(engine: CohortEngine) -> None:
    for layer in engine.resident.shapes:
        weight = engine.resident.base_weight(layer)
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            wanted = engine.resident.model.get_submodule(layer)(x)
        torch.testing.assert_close(x @ weight.T, wanted, atol=1e-4, rtol=1e-4)
