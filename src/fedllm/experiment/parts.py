"""From a configuration to the parts of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fedllm import algorithms
from fedllm.config import Config
from fedllm.data import Dataset, Partition, load_dataset, partition
from fedllm.errors import DataError
from fedllm.evaluation import Evaluator, Scope
from fedllm.experiment.exchange import reception_of, transport_of
from fedllm.experiment.execution import executor_of
from fedllm.experiment.schedules import schedule_of
from fedllm.experiment.world import left_bytes, or_ideal, population_of, too_small, world_of
from fedllm.federation import BaseClient, BaseServer, Plan, Scorer, objective_of
from fedllm.seeding import derive
from fedllm.system import RankRule, SimulatedWorld, rank_rule

if TYPE_CHECKING:
    from fedllm.engine import CohortEngine
    from fedllm.models import Kind, LoadedModel
    from fedllm.simulation import Loop

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    config: Config
    dataset: Dataset
    partition: Partition
    loaded: LoadedModel
    engine: CohortEngine
    server: BaseServer
    client: BaseClient
    loop: Loop
    evaluator: Evaluator

    @property
    def kind(self) -> Kind:
        """What the model does."""
        return self.loaded.kind

    @property
    def task_type(self) -> str:
        """PEFT's name for that."""
        return "CAUSAL_LM" if self.kind == "causal-lm" else "SEQ_CLS"

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Which views are evaluated."""
        has_head = bool(self.engine.resident.heads)
        has_own = self.server.is_personal or (self.server.head == "local" and has_head)
        match self.config.evaluation.scope:
            case "global" | "personal" as scope:
                return (scope,)
            case "both":
                return ("global", "personal")
            case "auto":
                return ("global", "personal") if has_own else ("global",)


def plan_of(config: Config) -> Plan:
    """Return steps and learning rates."""
    return Plan(config.training, config.federation.rounds)


def ranks_of(
    config: Config,
    shapes: Mapping[str, tuple[int, int]],
    head_parameters: int,
    world: SimulatedWorld | None = None,
) -> RankRule:
    """Return which rank each client has.

    Args:
        config: The checked configuration.
        shapes: Adapted layer to (out, in) of its weight; what fits a memory depends on them.
        head_parameters: Size of the classification head.
        world: Has the clients' devices, in realistic mode.

    Raises:
        ConfigError: If the smallest rank does not fit every client's memory.
    """
    return rank_rule(
        config.adapter.rank,
        config.seed,
        num_clients=config.federation.num_clients,
        rank_parameters=sum(sum(shape) for shape in shapes.values()),
        head_parameters=0 if config.adapter.head == "frozen" else head_parameters,
        left_bytes=None if world is None else partial(left_bytes, world),
    )


def scaling_of(config: Config) -> float:
    """Return alpha / r at the largest rank, the scaling of every client."""
    rank = config.adapter.max_rank
    alpha = config.adapter.alpha if config.adapter.alpha is not None else 2.0 * rank
    return float(alpha / (rank**0.5 if config.adapter.rslora else rank))


def load_data(config: Config, tokenizer: object) -> tuple[Dataset, Partition]:
    """Tokenise the data set once and divide it among clients.

    Raises:
        DataError: If the data is wrong.
        ConfigError: If it does not fit the objective.
    """
    from fedllm.models import resolve_kind

    dataset = load_dataset(
        config.data,
        tokenizer,  # type: ignore[arg-type]  # transformers' own base class fits the protocol
        kind=lambda task: resolve_kind(config.model, task),
        seed=config.seed,
        template=config.model.chat_template,
        partition=config.federation.partition,
    )
    objective_of(config.training, dataset.task)  # refuses what the data does not allow for
    federation = config.federation
    shards = partition(federation.partition, dataset, federation.num_clients, config.seed)
    return dataset, shards


def load_base(config: Config, dataset: Dataset) -> LoadedModel:
    """Load the base model for a data set's task and classes.

    Raises:
        ModelError: If the model is wrong.
    """
    from fedllm.models import load_model, resolve_kind

    return load_model(
        config.model,
        kind=resolve_kind(config.model, dataset.task),
        num_labels=len(dataset.label_names),
        label_names=dataset.label_names,
        seed=derive(config.seed, "head"),
    )


def build(config: Config, say: Say = lambda text: None) -> Parts:
    """Load the model, tokenise the data and put a run together.

    Args:
        config: The checked configuration.
        say: Told what is being done.

    Raises:
        DataError: If the data is wrong.
        ModelError: If the model is wrong.
        ConfigError: If they do not fit what is asked.
    """
    from fedllm.models import load_tokenizer, position_limit

    say("reading the data")
    dataset, shards = load_data(config, load_tokenizer(config.model))
    say("loading the model")
    loaded = load_base(config, dataset)
    check_length(position_limit(loaded.model), loaded.source, dataset)
    engine = _engine(config, dataset, shards, loaded)
    evaluator = _evaluator(config, dataset, shards, loaded.kind, engine)
    world = _world(config, dataset, loaded.kind)
    server, client = _algorithm(config, engine, world)
    loop = _loop(config, shards, engine, server, client, world)
    return Parts(config, dataset, shards, loaded, engine, server, client, loop, evaluator)


def engine_of(config: Config) -> tuple[CohortEngine, BaseClient]:
    """Load only what local training needs: for a worker process."""
    from fedllm.models import load_tokenizer

    dataset, shards = load_data(config, load_tokenizer(config.model))
    loaded = load_base(config, dataset)
    chosen, head = config.algorithm, config.adapter.head
    _, client = algorithms.make(chosen.name, chosen.settings, head)
    return _engine(config, dataset, shards, loaded), client


def _engine(
    config: Config, dataset: Dataset, shards: Partition, loaded: LoadedModel
) -> CohortEngine:
    from fedllm.engine import CohortEngine, Resident

    resident = Resident(
        loaded,
        config.adapter.targets,
        dropout=config.adapter.dropout,
        tokens_per_pass=config.training.tokens_per_pass,
        stop_ids=dataset.stop_ids,
    )
    return CohortEngine(resident, dataset.train, shards, plan_of(config))


def _world(config: Config, dataset: Dataset, kind: Kind) -> SimulatedWorld | None:
    """Return the world of realistic mode; its cost model needs the model's shapes."""
    if config.mode == "prototype":
        return None
    from fedllm.experiment.estimate import shapes_of

    return world_of(config, shapes_of(config, kind, dataset.label_names), dataset)


def _algorithm(
    config: Config, engine: CohortEngine, world: SimulatedWorld | None
) -> tuple[BaseServer, BaseClient]:
    """Return server and client behaviour, started from the common adapter."""
    head = config.adapter.head
    server, client = algorithms.make(config.algorithm.name, config.algorithm.settings, head)
    start = engine.resident.initial_adapter(
        config.adapter.max_rank, scaling_of(config), derive(config.seed, "adapter")
    )
    head_parameters = sum(tensor.numel() for tensor in engine.resident.head_start.values())
    server.start(
        start,
        ranks_of(config, engine.resident.shapes, head_parameters, world),
        head,
        num_clients=config.federation.num_clients,
        rounds=config.federation.rounds,
        seed=derive(config.seed, "server"),
        weight_of=engine.resident.base_weight,
        downlink=transport_of(config).downlink,
    )
    return server, client


def _loop(
    config: Config,
    shards: Partition,
    engine: CohortEngine,
    server: BaseServer,
    client: BaseClient,
    world: SimulatedWorld | None,
) -> Loop:
    from fedllm.simulation import Loop

    federation = config.federation
    excluded = frozenset[int]() if world is None else too_small(config, world, server.ranks)
    return Loop(
        server=server,
        client=client,
        world=or_ideal(world),
        executor=executor_of(config, engine, client),
        plan=plan_of(config),
        population=population_of(engine.lengths, shards, excluded),
        seed=config.seed,
        schedule=schedule_of(federation),
        reception=reception_of(config),
        selection=federation.selection,
        at_window_close=federation.at_window_close,
        compute=config.execution.compute,
        lost=config.execution.lost,
        time_limit_s=math.inf if federation.time_limit_s is None else federation.time_limit_s,
    )


def _evaluator(
    config: Config, dataset: Dataset, shards: Partition, kind: Kind, scorer: Scorer
) -> Evaluator:
    return Evaluator(
        scorer=scorer,
        tokens=dataset.test,
        partition=shards,
        task=dataset.task,
        kind=kind,
        label_names=dataset.label_names,
        config=config.evaluation,
        seed=config.seed,
        prompts=[row.subject for row in dataset.rows.test],
    )


def check_length(limit: int | None, source: str, dataset: Dataset) -> None:
    """Refuse rows longer than the positions the model has learned.

    Raises:
        DataError: If there is such a row.
    """
    splits = (dataset.train, dataset.test)
    sides = [side for split in splits for side in (split, split.rejected) if side is not None]
    longest = max(int(side.lengths.max()) for side in sides)
    if limit is not None and longest > limit:
        raise DataError(
            f"the longest row has {longest} tokens, but {source} knows {limit} positions."
            f" Set data.max_length: {limit} (with data.overlong: drop or truncate)"
        )
