"""What a run will take, worked out from shapes and counts: bytes, memory and time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedllm.config import Config
from fedllm.data import Dataset, Partition
from fedllm.evaluation import BY_TASK, METRICS
from fedllm.experiment.parts import plan_of
from fedllm.federation import forward_passes, objective_of, trained_lengths, trained_share

if TYPE_CHECKING:
    from fedllm.models import Kind

_BYTES_PER_TRAINED = 16
"""fp32 parameter, gradient and two moments of AdamW."""
_SHARE_OF_MATMUL = 0.25
"""What training and scoring reach of the rate at which one large matrix product runs."""
_SHARE_OF_GENERATION = 0.025
"""The same for generation, a token of each prompt at a time."""
_PROBE_S = 0.1


@dataclass(frozen=True)
class Shapes:
    """What is known of a model from its `config.json` alone."""

    modules: Mapping[str, tuple[int, int]]
    """Target module to (out, in) of its weight."""
    heads: Mapping[str, tuple[int, ...]]
    """Tensors of a classification head."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    body_parameters: int
    """Parameters that every token is multiplied with: without embeddings and output matrix."""
    table_parameters: int
    """Of embeddings and output matrix; tied, they count once."""

    @property
    def head_parameters(self) -> int:
        """Size of the classification head."""
        return sum(int(np.prod(shape)) for shape in self.heads.values())


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training."""

    base_bytes: int
    buffer_bytes: int
    activation_bytes: int
    clients_in_a_pass: int
    tokens_in_a_pass: int

    @property
    def total_bytes(self) -> int:
        """All of it together."""
        return self.base_bytes + self.buffer_bytes + self.activation_bytes


@dataclass(frozen=True)
class Duration:
    """Seconds, roughly, and what they were derived from."""

    round_s: float
    """Local training of a cohort."""
    evaluation_s: float
    """One evaluation of the global view."""
    evaluations: int
    flops_per_token: float
    """Of training, forward and backward."""
    tokens_per_round: float
    matmul_flops_per_s: float
    """Measured here, on this model's shapes."""
    total_s: float


def shapes_of(config: Config, kind: Kind, label_names: Sequence[str]) -> Shapes:
    """Read a model's shapes without loading a weight.

    Raises:
        ModelError: If the model, its architecture or a target is wrong.
    """
    from fedllm.models import head_tensors, linear_shape, target_modules
    from fedllm.models.architecture import read_architecture, skeleton
    from fedllm.models.sources import locate

    folder = locate(config.model, weights=False)
    architecture = read_architecture(folder, config.model, kind, 0, label_names)
    model = skeleton(architecture, config.model, kind)
    modules = {}
    for name in target_modules(model, config.adapter.targets):
        size = linear_shape(model.get_submodule(name))
        assert size is not None
        modules[name] = (size[1], size[0])
    text = architecture.get_text_config()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    # a set, because tied tables are one
    outside = {p for table in tables if table is not None for p in table.parameters()}
    return Shapes(
        modules=modules,
        heads={n: tuple(model.get_parameter(n).shape) for n in head_tensors(model, kind)},
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        vocabulary=int(text.vocab_size),
        body_parameters=sum(p.numel() for p in model.parameters() if p not in outside),
        table_parameters=sum(p.numel() for p in outside),
    )


def memory(config: Config, shapes: Shapes, dataset: Dataset, base_bytes: int) -> Memory:
    """Add up base, buffers of the clients that train together, and one pass's activations.

    base + K P (16 + b) + T L (10 h + 4 m) b + 12 S V, with K clients in a pass, P trained
    parameters, b bytes of a number in the base's dtype, T tokens in a pass, L layers, hidden h,
    MLP m, S supervised tokens in the pass and V words (logits, in fp32 and with their gradient).
    """
    from fedllm.engine import TOKENS_PER_PASS, clients_at_once
    from fedllm.models import resolve_device, resolve_dtype

    device = resolve_device(config.model.device)
    item = resolve_dtype(config.model.dtype, device).itemsize
    asked = config.training.tokens_per_pass
    limit = TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS["cuda"]) if asked == "auto" else asked
    objective = objective_of(config.training, dataset.task)
    lengths = trained_lengths(dataset.train, objective)
    step_tokens = float(lengths.mean()) * plan_of(config).rows_per_step
    trained = sum(sum(shape) for shape in shapes.modules.values()) * config.adapter.max_rank
    trained += shapes.head_parameters
    together = min(clients_at_once(limit, step_tokens, trained), config.federation.cohort)
    tokens = int(min(max(limit, lengths.max()), together * step_tokens))
    supervised = tokens * trained_share(dataset.train, objective)
    per_token = shapes.layers * (10 * shapes.hidden + 4 * shapes.intermediate) * item
    return Memory(
        base_bytes=base_bytes,
        buffer_bytes=together * trained * (_BYTES_PER_TRAINED + item),
        activation_bytes=int(tokens * per_token + 12 * supervised * shapes.vocabulary),
        clients_in_a_pass=together,
        tokens_in_a_pass=tokens,
    )


def duration(
    config: Config, shapes: Shapes, dataset: Dataset, partition: Partition, tokens_in_a_pass: int
) -> Duration:
    """Divide the operations of a run by a share of the matmul rate measured here.

    A frozen weight costs 2 operations a token forward and 2 backward (no gradient of its own), the
    output matrix only where a token is supervised; a scored token costs half, and an answer's
    tokens are generated at a tenth of the speed. Attention and the adapters are left out, and what
    the base says of preferences too, which is computed once.
    """
    rate = _matmul_rate(config, shapes, tokens_in_a_pass)
    plan, federation = plan_of(config), config.federation
    steps = np.array([plan.steps(int(size)) for size in partition.train_sizes])
    rows = float(steps.mean()) * min(plan.rows_per_step, float(partition.train_sizes.mean()))
    objective = objective_of(config.training, dataset.task)
    example_tokens = float(trained_lengths(dataset.train, objective).mean())
    per_round = rows * federation.cohort * example_tokens
    output = shapes.vocabulary * shapes.hidden
    share = trained_share(dataset.train, objective)
    per_token = (4.0 + 2.0 * max(forward_passes(objective) - 1, 0)) * (
        shapes.body_parameters + output * share
    )
    test = int(trained_lengths(dataset.test, objective).sum())
    scored = 2.0 * test * (shapes.body_parameters + output * share)
    evaluate = scored / (rate * _SHARE_OF_MATMUL)
    if _generates(config, dataset):
        prompts = 2.0 * test * shapes.body_parameters / (rate * _SHARE_OF_MATMUL)
        words = 2.0 * int(dataset.test.supervised.sum()) * (shapes.body_parameters + output)
        evaluate += prompts + words / (rate * _SHARE_OF_GENERATION)
    evaluations = 1 + (federation.rounds // every if (every := config.evaluation.every) else 0)
    round_s = per_token * per_round / (rate * _SHARE_OF_MATMUL)
    return Duration(
        round_s=round_s,
        evaluation_s=evaluate,
        evaluations=evaluations,
        flops_per_token=per_token,
        tokens_per_round=per_round,
        matmul_flops_per_s=rate,
        total_s=round_s * federation.rounds + evaluate * evaluations,
    )


def _generates(config: Config, dataset: Dataset) -> bool:
    """Tell whether evaluation generates answers."""
    from fedllm.models import resolve_kind

    names = config.evaluation.metrics
    chosen = BY_TASK[dataset.task] if isinstance(names, str) else names
    needs = {METRICS[name].needs for name in chosen}
    is_causal = resolve_kind(config.model, dataset.task) == "causal-lm"
    return is_causal and bool(needs & {"answers", "classes"})


def _matmul_rate(config: Config, shapes: Shapes, tokens: int) -> float:
    """Measure operations a second of (tokens, hidden) x (hidden, intermediate), for 0.1 s."""
    import torch

    from fedllm.models import resolve_device, resolve_dtype

    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    left = torch.ones(tokens, shapes.hidden, dtype=dtype, device=device)
    right = torch.ones(shapes.hidden, shapes.intermediate, dtype=dtype, device=device)
    float((left @ right)[0, 0])  # the first product pays for loading kernels
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < _PROBE_S:
        for _ in range(4):
            product = left @ right
        float(product[0, 0])  # waits for an accelerator
        count += 4
    elapsed = time.perf_counter() - begin
    return 2.0 * tokens * shapes.hidden * shapes.intermediate * count / elapsed
