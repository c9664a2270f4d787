"""Federated algorithms: an explicit table, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedllm.algorithms import composition
from fedllm.errors import ConfigError, did_you_mean, unknown
from fedllm.federation import BaseClient, BaseServer, HeadPolicy
from fedllm.registry import Entry, Table

ALGORITHMS = Table(
    "algorithm",
    {
        "fedit": Entry("fedllm.algorithms.fedit", "weighted mean of A and B (FedAvg on LoRA)"),
        "ffa-lora": Entry("fedllm.algorithms.ffa_lora", "A frozen, B averaged: exact"),
        "fedsa-lora": Entry("fedllm.algorithms.fedsa_lora", "A shared, B personal"),
        "rolora": Entry("fedllm.algorithms.rolora", "B and A in turn: exact"),
        "flexlora": Entry("fedllm.algorithms.flexlora", "mean of products, refactored by SVD"),
        "flora": Entry("fedllm.algorithms.flora", "stacked adapters merged into the base: exact"),
        "fedex-lora": Entry("fedllm.algorithms.fedex_lora", "means, and the rest merged: exact"),
        "fedsvd": Entry("fedllm.algorithms.fedsvd", "B averaged, A made orthonormal anew: exact"),
        "ravan": Entry("fedllm.algorithms.ravan", "frozen bases with trained cores: exact"),
        "slora": Entry("fedllm.algorithms.slora", "sparse changes first, then LoRA from there"),
        "ilora": Entry("fedllm.algorithms.ilora", "QR of the weights, QR of the mean product"),
        "fedrot-lora": Entry("fedllm.algorithms.fedrot_lora", "factors turned before averaging"),
        "fedmomentum": Entry("fedllm.algorithms.fedmomentum", "SVD; what is left over is merged"),
        "hetlora": Entry("fedllm.algorithms.hetlora", "padded means by norm; ranks are pruned"),
        "lora-fair": Entry("fedllm.algorithms.lora_fair", "means, and B corrected by the server"),
        "cyclic": Entry("fedllm.algorithms.cyclic", "from client to client, one at a time"),
        "local-only": Entry("fedllm.algorithms.local_only", "nothing is shared"),
        "fine-tune": Entry("fedllm.algorithms.fine_tune", "FedIT, then each client's own copy"),
        "ditto": Entry("fedllm.algorithms.ditto", "FedIT, and a personal adapter drawn towards it"),
        "feddpa-f": Entry("fedllm.algorithms.feddpa_f", "FedIT, then local; mixed by instance"),
        "feddpa-t": Entry("fedllm.algorithms.feddpa_t", "local, global in turn; mixed by instance"),
        "pfedlora": Entry("fedllm.algorithms.pfedlora", "private and shared in turn; both active"),
        "fedlease": Entry("fedllm.algorithms.fedlease", "an expert for each cluster, and routers"),
        "hilora": Entry("fedllm.algorithms.hilora", "adapters of all, a cluster and one client"),
        "fedalt": Entry("fedllm.algorithms.fedalt", "own, beside the mean of all others; routed"),
        "fedprox": Entry("fedllm.algorithms.fedprox", "clients drawn towards their download"),
        "scaffold": Entry("fedllm.algorithms.scaffold", "control variates against client drift"),
        "fedavgm": Entry("fedllm.algorithms.fedavgm", "momentum on the server"),
        "fedadagrad": Entry("fedllm.algorithms.fedadagrad", "Adagrad on the server"),
        "fedadam": Entry("fedllm.algorithms.fedadam", "Adam on the server"),
        "fedyogi": Entry("fedllm.algorithms.fedyogi", "Yogi on the server"),
    },
)
SCHEDULES = ("sync", "buffered", "async", "semi-sync", "sequential")
"""What `federation.schedule` may be."""
OPTIMIZERS = ("fedprox", "scaffold", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
"""Algorithms that go with others, under `algorithm.optimizer`; alone they go with FedIT."""


def server_class(name: str, optimizer: str | None = None) -> type[BaseServer]:
    """Return the server class of an algorithm, with an optimiser mixed in if one is named.

    Raises:
        ConfigError: If there is no such algorithm.
    """
    return composition.server_class(ALGORITHMS[name].target, _target(optimizer))


def make(
    name: str, settings: Mapping[str, Any], head: HeadPolicy = "shared"
) -> tuple[BaseServer, BaseClient]:
    """Return the server and the client behaviour of an algorithm.

    Args:
        name: As under `algorithm.name`.
        settings: The keys beside the name, `optimizer` among them.
        head: What happens to tensors trained in full.

    Raises:
        ConfigError: If the name or a setting is wrong.
    """
    wrong = problems(name, settings)
    if wrong:
        raise ConfigError(wrong)
    own = dict(settings)
    optimizer = own.pop("optimizer", None)
    server = server_class(name, optimizer)(**own)
    return server, composition.client(ALGORITHMS[name].target, _target(optimizer), head)


def _target(optimizer: str | None) -> str | None:
    return None if optimizer is None else ALGORITHMS[optimizer].target


def problems(
    name: str,
    settings: Mapping[str, Any],
    *,
    mixed_rank: bool = False,
    local_optimizer: str = "sgd",
    schedule: str = "sync",
) -> list[str]:
    """Return what is wrong with an algorithm's name and settings, one sentence each.

    Args:
        name: As under `algorithm.name`.
        settings: The keys beside the name, `optimizer` among them.
        mixed_rank: Whether clients have unequal ranks.
        local_optimizer: As under `training.optimizer`; `sgd` is plain.
        schedule: As under `federation.schedule`.
    """
    if name not in ALGORITHMS:
        return [f"algorithm.name: {unknown('algorithm', name, ALGORITHMS)}"]
    own = dict(settings)
    optimizer = own.pop("optimizer", None)
    wrong = [] if optimizer is None else _pair_problems(name, optimizer)
    if wrong:  # the pair is told of; its optimiser's settings are no second mistake
        spare = {key for other in OPTIMIZERS for key in settings_of(server_class(other))}
        own = {key: own[key] for key in own if key not in spare - {*settings_of(BaseServer)}}
    cls = server_class(name, None if wrong else optimizer)
    wrong += _setting_problems(name, cls, own)
    if "scaffold" in (name, optimizer) and own.get("option") == "II" and local_optimizer != "sgd":
        wrong.append(_OPTION_II.format(local_optimizer))
    wrong += _schedule_problems(name, cls, schedule)
    if mixed_rank and cls.mixed_rank == "unsupported":
        able = [other for other in ALGORITHMS if server_class(other).mixed_rank != "unsupported"]
        wrong.append(
            f"adapter.rank: '{name}' needs one rank for all clients; give a number,"
            f" or choose one of {', '.join(able)}"
        )
    return wrong


_OPTION_II = (
    "algorithm.option: 'II' divides by the learning rate, which is right for plain sgd and not for"
    " {}; choose option I, or training.optimizer: sgd with training.momentum: 0"
)


def _schedule_problems(name: str, cls: type[BaseServer], schedule: str) -> list[str]:
    why = cls.refused_schedules.get(schedule)
    able = " or ".join(other for other in SCHEDULES if other not in cls.refused_schedules)
    told = f"federation.schedule: '{schedule}' is not defined for '{name}': {why}; choose {able}"
    return [told] if why else []


def _pair_problems(name: str, optimizer: Any) -> list[str]:
    if optimizer not in OPTIMIZERS:
        return [f"algorithm.optimizer: {unknown('optimizer', str(optimizer), OPTIMIZERS)}"]
    if name in OPTIMIZERS:
        return [
            f"algorithm.optimizer: '{name}' is an optimiser itself; name the method it goes with,"
            f" such as fedit"
        ]
    why = server_class(name).recoordinated
    if why:
        return [f"algorithm.optimizer: '{optimizer}' is not defined on '{name}': {why}"]
    return []


def _setting_problems(name: str, cls: type[BaseServer], settings: Mapping[str, Any]) -> list[str]:
    known, wrong = settings_of(cls), []
    for key, value in settings.items():
        if key not in known:
            names = [*known, "optimizer"]
            hint = did_you_mean(key, names) or f" '{name}' has: {', '.join(names)}"
            wrong.append(f"algorithm.{key}: unknown key.{hint}")
            continue
        try:
            TypeAdapter(known[key]).validate_python(value, strict=True)
        except ValidationError as error:
            wrong.append(f"algorithm.{key}: {error.errors()[0]['msg'].lower()} (got {value!r})")
    return wrong


def settings_of(cls: type[BaseServer]) -> dict[str, Any]:
    """Return the settings of an algorithm, name to type."""
    hints = get_type_hints(cls, localns={"Tensor": object}, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}
