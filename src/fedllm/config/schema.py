"""The configuration: one tree of frozen models, each default in its field and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from fedllm.config.data import DataConfig
from fedllm.config.exchange import CommunicationConfig, UpdatesConfig
from fedllm.config.execution import ExecutionConfig
from fedllm.config.ranks import Rank, ranks_in
from fedllm.config.schedules import Schedule, SyncSchedule
from fedllm.config.section import Section
from fedllm.config.system import SystemConfig
from fedllm.config.training import TrainingConfig


class ModelConfig(Section):
    """Which language model is fine-tuned, and how it is held in memory."""

    path: str = "builtin:tiny"
    """`builtin:tiny`, a local folder in Hugging Face layout, or a hub id."""
    kind: Literal["auto", "causal-lm", "sequence-classification"] = "auto"
    """`auto`: sequence classification for `data.task: classification`, else a causal LM."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the hardware multiplies it fast, else float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the frozen base in 8 or 4 bits (needs `fedllm[quant]`)."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless you have read that code."""
    chat_template: str = "auto"
    """`auto` (the tokenizer's own, else `plain`), a fallback's name, or a `.jinja` file."""


class AdapterConfig(Section):
    """The LoRA adapter that the clients train."""

    rank: Rank = 8
    """LoRA rank r; a list gives each client one of its ranks, drawn from (seed, client), and a
    policy decides it by `tiers`, by `distribution` or by `memory`."""
    alpha: PositiveFloat | None = None
    """LoRA alpha at the largest rank; scaling = alpha / r is the same for all. Default 2 r."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of the low-rank path, while training."""
    targets: Literal["auto", "all-linear"] | list[str] = "auto"
    """Which linear layers get an adapter: `auto` (attention query and value), `all-linear`
    (every linear layer but the head), or a list of module names."""
    head: Literal["shared", "local", "frozen"] = "shared"
    """What happens to a classification head: averaged, kept by each client, or not trained."""

    @property
    def max_rank(self) -> int:
        """The largest rank any client may have."""
        return max(ranks_in(self.rank))


class PartitionConfig(Section):
    """How rows are divided among clients."""

    name: Literal["iid", "dirichlet", "shards", "column", "quantity", "length", "topic"] = "iid"
    """See `fedllm list partitions`."""
    alpha: PositiveFloat = 0.5
    """Concentration of `dirichlet` and `quantity`: smaller is more uneven."""
    by: str | None = None
    """Column that `dirichlet`, `shards` (a label) or `column` (an id) go by; default: the label
    or category that the rows have."""
    shards_per_client: PositiveInt = 2
    """For `shards`: how many single-label shards each client gets."""
    topics: Annotated[int, Field(ge=2)] = 10
    """For `topic`: number of k-means clusters over TF-IDF."""
    min_rows: Annotated[int, Field(ge=0)] = 1
    """Each client gets at least this many training rows."""


class FederationConfig(Section):
    """Who takes part, and for how long."""

    num_clients: PositiveInt = 8
    """Size of the population."""
    cohort_size: PositiveInt | None = None
    """Clients sampled each round; default all."""
    rounds: PositiveInt = 10
    """How many server updates the run makes."""
    schedule: Schedule = Field(default_factory=SyncSchedule)
    """When the server aggregates: `sync`, `buffered`, `async`, `semi-sync` or `sequential`, or a
    mapping with the name and settings. In those without rounds, `cohort_size` clients work at any
    time."""
    selection: Literal["available", "any"] = "available"
    """Draw cohorts among the clients that are there, or among all, who then are waited for."""
    at_window_close: Literal["discard", "partial", "pause"] = "discard"
    """What becomes of a job at the end of its client's window: it is lost, as many steps are done
    as leave time to send them, or it goes on in the next window."""
    time_limit_s: PositiveFloat | None = None
    """End the run at this virtual time, whatever `rounds` says."""
    partition: PartitionConfig = Field(default_factory=PartitionConfig)

    @model_validator(mode="after")
    def _cohort_within_population(self) -> FederationConfig:
        if self.cohort_size is not None and self.cohort_size > self.num_clients:
            raise ValueError(
                f"cohort_size {self.cohort_size} is larger than num_clients {self.num_clients}"
            )
        return self

    @property
    def cohort(self) -> int:
        """Clients sampled each round."""
        return self.cohort_size or self.num_clients


class EvaluationConfig(Section):
    """What is measured while the run goes on."""

    every: Annotated[int, Field(ge=0)] = 1
    """Evaluate after every so many rounds; 0 means only at the end."""
    scope: Literal["auto", "global", "personal", "both"] = "auto"
    """The global view on all test rows, each client's own view on its own, or both; `auto` takes
    `both` where clients keep something of their own, else `global`."""
    max_rows: PositiveInt | None = None
    """Evaluate on at most this many test rows (drawn from the seed) until the last round."""
    metrics: list[str] | Literal["auto"] = "auto"
    """See `fedllm list metrics`; `auto` takes those that fit the task."""
    max_new_tokens: PositiveInt = 64
    """Longest generated answer."""
    batch_size: PositiveInt = 64
    """Prompts generated for at once."""


class CheckpointConfig(Section):
    """What is saved while the run goes on."""

    every: PositiveInt = 1
    """Save after every so many rounds; the last round is always saved."""
    keep: PositiveInt = 2
    """How many checkpoints are kept."""


class AlgorithmConfig(BaseModel):
    """Which algorithm, and its own settings beside the name."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    name: str = "fedit"

    @property
    def settings(self) -> dict[str, Any]:
        """The algorithm's own settings, checked by `fedllm.algorithms.problems`."""
        return dict(self.model_extra or {})


class Config(Section):
    """A whole run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run inside `output_dir`."""
    output_dir: Path = Path("runs")
    """Where run directories go."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Root of every random stream."""
    mode: Literal["prototype", "realistic"] = "prototype"
    """`prototype`: infinitely fast devices and links, always available. `realistic`: as `system`
    says."""
    system: SystemConfig = Field(default_factory=SystemConfig)
    """The world of realistic mode, inline or as the path of a `sys.yaml`."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    communication: CommunicationConfig = Field(default_factory=CommunicationConfig)
    updates: UpdatesConfig = Field(default_factory=UpdatesConfig)
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _world_is_used(self) -> Config:
        if self.mode == "prototype" and self.system != SystemConfig():
            raise ValueError(
                "system: devices, links and availability play no part in prototype mode; set mode:"
                " realistic, or take system out"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The folder this run writes to."""
        return self.output_dir / self.name
