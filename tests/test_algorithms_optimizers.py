"""What the specification says of optimisers on the shared tensors (5.1 to 5.4), in float64."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.sanitiser import digest
from conformance.world import (
    CLIENTS,
    HEAD,
    FakeEngine,
    Federation,
    assert_same,
    mixed_ranks,
    noise,
    run_jobs,
)
from engine_world import make_world
from torch import Tensor

from fedllm.adapters import Adapter, is_a, is_b, is_core, is_gain, name_a, name_b, note
from fedllm.algorithms import ALGORITHMS, OPTIMIZERS, make, problems, server_class, settings_of
from fedllm.algorithms.composition import client_class
from fedllm.algorithms.composition import server_class as composed
from fedllm.config import TrainingConfig
from fedllm.errors import ConfigError
from fedllm.executors import InlineExecutor
from fedllm.experiment import make_config
from fedllm.federation import (
    BaseServer,
    ControlClient,
    FitRequest,
    FitResult,
    Job,
    Part,
    SharedPass,
    Update,
)
from fedllm.system import RankRule

METHODS = [name for name in ALGORITHMS if name not in OPTIMIZERS]
UNDEFINED = [
    "flexlora",
    "flora",
    "fedex-lora",
    "fedsvd",
    "slora",
    "ilora",
    "fedrot-lora",
    "fedmomentum",
    "hetlora",
    "lora-fair",
    "local-only",
    "fedlease",
    "hilora",
    "fedalt",
]
DEFINED = [name for name in METHODS if name not in UNDEFINED]
MOMENTS = ("fedadagrad", "fedadam", "fedyogi")
SERVER_SIDE = ("fedavgm", *MOMENTS)
PAIRS = [(method, optimizer) for method in DEFINED for optimizer in OPTIMIZERS]
FITTING = {"ravan": {"heads": 2}}
"""What a method needs in order to fit the small matrices of the tests."""

# a quadratic for each client: h / 2 || x - t ||^2, on every tensor alike


@dataclass
class Bowls(FakeEngine):
    """Clients whose losses are quadratic in whatever they train."""

    heights: Sequence[float] = (1.0, 9.0)
    targets: Sequence[float] = (0.0, 1.0)

    def _loss(self, request: FitRequest, live: Mapping[str, Tensor], step: int) -> Tensor:
        cid = request.job.cid
        gaps = [(t - self.targets[cid]).square().sum() for t in live.values()]
        return torch.stack(gaps).sum() * (self.heights[cid] / 2)


def tiny() -> Adapter:
    """Return one module of rank 1 that starts at zero, as the oracle's numbers do."""
    tensors = {
        name_a("q"): torch.zeros(1, 2, dtype=torch.float64),
        name_b("q"): torch.zeros(3, 1, dtype=torch.float64),
    }
    return Adapter(tensors, {"q": 2.0})


@dataclass
class Valley:
    """An algorithm over clients whose optimum is known."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: Bowls = field(default_factory=Bowls)
    steps: int = 5
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        self.server, self.client = make(self.name, {"weights": "uniform", **self.settings})
        clients = len(self.engine.heights)
        self.server.start(tiny(), RankRule((1,)), num_clients=clients, rounds=1000)
        self.states: dict[int, Mapping[str, Tensor]] = {}

    def round(self, cohort: Sequence[int]) -> list[Update]:
        jobs = [
            replace(
                job,
                steps=self.steps,
                learning_rate=self.learning_rate,
                num_samples=1,
                state=self.states.get(job.cid, {}),
            )
            for job in self.server.local_run(cohort)
        ]
        updates = run_jobs(jobs, self.client, self.engine)
        self.states |= {update.cid: update.state for update in updates}
        self.server.apply([Part(1.0, update) for update in updates])
        return updates

    def run(self, rounds: int) -> Valley:
        for _ in range(rounds):
            self.round(range(len(self.engine.heights)))
        return self

    @property
    def optimum(self) -> float:
        pulls = zip(self.engine.heights, self.engine.targets, strict=True)
        return sum(h * t for h, t in pulls) / sum(self.engine.heights)

    @property
    def points(self) -> list[float]:
        """The values of all entries of the model."""
        return torch.cat([t.flatten() for t in self.server.adapter.tensors.values()]).tolist()


# a server alone, whose clients moved by what the test says


def started(name: str, *, is_zero: bool = False, **settings: Any) -> BaseServer:
    """Return a server that starts from random tensors, or from zeros."""
    server, _ = make(name, settings)
    drawn = {n: noise(t.shape, "start", n) for n, t in tiny().tensors.items()}
    server.start(tiny().overlaid({} if is_zero else drawn), RankRule((1,)), num_clients=2)
    return server


def changes(number: int, size: float = 1.0) -> dict[str, Tensor]:
    """Return the change of every tensor in a round."""
    return {n: noise(t.shape, "change", number, n) * size for n, t in tiny().tensors.items()}


def moved_by(server: BaseServer, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let two clients move the model by so much in the mean; return how far the server went."""
    before = server.adapter
    parts = []
    for cid, share in ((0, 0.25), (1, 1.75)):
        trained = before.overlaid({n: before[n] + t * share for n, t in change.items()})
        sent = trained.select(lambda name: name in change)
        parts.append(Part(1.0, Update(cid, server.version, sent, num_samples=1, num_steps=1)))
    server.apply(parts)
    return {n: server.adapter[n] - before[n] for n in before}


def state_of(server: BaseServer, name: str) -> dict[str, Tensor]:
    """Return a part of a server's state that only some servers have."""
    found: dict[str, Tensor] = getattr(server, name)
    return found


def tensors_of(fed: Federation) -> dict[str, str]:
    """Hash the global model and all private tensors that are part of a model."""
    held = {f"global {n}": digest(t) for n, t in fed.server.adapter.tensors.items()}
    for cid in CLIENTS:
        held |= {f"{cid} {n}": digest(t) for n, t in fed.store.get(cid).items() if n[0] != "~"}
    return held


def federation(method: str, optimizer: str | None = None, **options: Any) -> Federation:
    """Return the usual four clients; options that `Federation` lacks are settings."""
    known = {f.name for f in fields(Federation)}
    settings = {key: options.pop(key) for key in list(options) if key not in known}
    settings |= FITTING.get(method, {}) | ({"optimizer": optimizer} if optimizer else {})
    return Federation(method, settings, **options)


# 5.1 FedProx


@pytest.mark.parametrize("method", DEFINED)
def test_fedprox_of_no_strength_is_its_method_bit_for_bit(method: str) -> None:
    fed = federation(method, "fedprox", mu=0.0).run(3)
    assert tensors_of(fed) == tensors_of(federation(method).run(3))


def proximal_gradients(
    fed: Federation, away: float, mu: float = 1.0
) -> tuple[dict[str, Tensor], Job]:
    """Return the gradient of the penalty, at a distance from where a client starts."""
    (job,) = fed.jobs([0])
    job = replace(job, settings={**job.settings, "mu": mu})
    start = fed.client.start(job)
    live = {n: (start[n] + away).requires_grad_() for n in start if fed.client.trainable(n, job)}
    penalty = fed.client.penalty(live, job)
    assert penalty is not None
    found = torch.autograd.grad(
        penalty, list(live.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(live, found, strict=True)), job


@pytest.mark.parametrize("method", ["fedit", "ffa-lora", "fedsa-lora", "rolora", "ravan"])
@pytest.mark.parametrize("head", ["shared", "local"])
def test_the_gradient_at_the_download_is_not_affected_by_the_proximal_term(
    method: str, head: Any
) -> None:
    fed = federation(method, "fedprox", head=head).run(2)
    grads, _ = proximal_gradients(fed, away=0.0)
    assert grads
    assert not any(bool(t.any()) for t in grads.values())


def test_the_proximal_term_pulls_by_mu_times_the_distance() -> None:
    grads, _ = proximal_gradients(Federation("fedprox").run(2), away=0.5, mu=3.0)
    assert_same(grads, {n: torch.full_like(t, 1.5) for n, t in grads.items()})


@pytest.mark.parametrize(
    ("method", "head", "pulled"),
    [
        ("fedit", "local", lambda n: n != HEAD),
        ("fedsa-lora", "shared", is_a),
        ("ffa-lora", "shared", lambda n: is_b(n) or n == HEAD),
    ],
)
def test_the_proximal_term_leaves_what_is_private_or_frozen(
    method: str, head: Any, pulled: Callable[[str], bool]
) -> None:
    fed = federation(method, "fedprox", head=head).run(2)
    grads, job = proximal_gradients(fed, away=0.5)
    names = {name for name, grad in grads.items() if bool(grad.any())}
    assert names == {name for name in job.payload.adapter if pulled(name)}


@pytest.mark.parametrize("mu", [0.001, 0.1, 1.0, 100.0, 1e6])
def test_a_client_of_fedprox_ends_between_its_optimum_and_the_download(mu: float) -> None:
    valley = Valley("fedprox", {"mu": mu}, Bowls(heights=(3.0,), targets=(2.0,)))
    valley.steps, valley.learning_rate = 400, 0.5 / (3.0 + mu)
    x = 0.0
    for _ in range(2):
        valley.run(1)
        x = (3.0 * 2.0 + mu * x) / (3.0 + mu)
        assert valley.points == pytest.approx([x] * 5, abs=1e-9)
    if mu == 1e6:  # mu -> inf: x_k -> x_t
        assert max(map(abs, valley.points)) < 2e-5


def test_a_personal_pass_knows_nothing_of_the_proximal_term() -> None:
    plain = Federation("ditto").run(1)
    drawn = Federation("ditto", {"optimizer": "fedprox", "mu": 2.0}).run(1)
    ours, theirs = tensors_of(drawn), tensors_of(plain)
    private = [n for n in ours if not n.startswith("global")]
    assert private
    assert [n for n in private if ours[n] != theirs[n]] == []
    assert drawn.server.adapter.digest() != plain.server.adapter.digest()


# 5.2 SCAFFOLD


def oracle(
    heights: Sequence[float], targets: Sequence[float], rounds: int, option: str, eta: float = 1.0
) -> tuple[float, float]:
    """Return x and c of SCAFFOLD on scalars, written out."""
    x, c, rate, steps = 0.0, 0.0, 0.05, 5
    own = [0.0] * len(heights)
    for _ in range(rounds):
        ends, deltas = [], []
        for k, (h, t) in enumerate(zip(heights, targets, strict=True)):
            y = x
            for _ in range(steps):
                y -= rate * (h * (y - t) + c - own[k])
            new = h * (x - t) if option == "I" else own[k] - c + (x - y) / (steps * rate)
            deltas.append(new - own[k])
            ends.append(y)
            own[k] = new
        x += eta * (sum(ends) / len(ends) - x)
        c += sum(deltas) / len(deltas)
    return x, c


each_option = pytest.mark.parametrize("option", ["I", "II"])


@each_option
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_scaffold_is_its_recursion(option: str, eta: float, rounds: int) -> None:
    settings = {"option": option, "server_learning_rate": eta}
    valley = Valley("scaffold", settings).run(rounds)
    x, c = oracle((1.0, 9.0), (0.0, 1.0), rounds, option, eta)
    assert valley.points == pytest.approx([x] * 5, abs=1e-12)
    for control in state_of(valley.server, "control").values():
        assert control.flatten().tolist() == pytest.approx([c] * control.numel(), abs=1e-12)


@each_option
@pytest.mark.parametrize(
    ("heights", "targets"), [((1.0, 9.0), (0.0, 1.0)), ((2.0, 0.5, 6.0), (1.0, -2.0, 0.5))]
)
def test_scaffold_reaches_the_optimum_of_unlike_clients_and_fedavg_does_not(
    option: str, heights: tuple[float, ...], targets: tuple[float, ...]
) -> None:
    bowls = Bowls(heights=heights, targets=targets)
    ours = Valley("scaffold", {"option": option}, bowls).run(400)
    theirs = Valley("fedit", {}, bowls).run(400)
    assert ours.points == pytest.approx([ours.optimum] * 5, abs=1e-6)
    assert min(abs(point - ours.optimum) for point in theirs.points) > 1e-2


@each_option
def test_scaffold_reaches_the_optimum_with_one_client_of_three_a_round(option: str) -> None:
    bowls = Bowls(heights=(1.0, 2.0, 3.0), targets=(0.0, 1.0, -1.0))
    valley = Valley("scaffold", {"option": option}, bowls)
    for number in range(900):
        valley.round([number % 3])
    assert valley.points == pytest.approx([valley.optimum] * 5, abs=1e-6)


@each_option
def test_scaffold_with_one_client_is_plain_training(option: str) -> None:
    bowls = Bowls(heights=(1.3,), targets=(2.0,))
    ours, theirs = Valley("scaffold", {"option": option}, bowls), Valley("fedit", {}, bowls)
    for _ in range(4):
        assert ours.run(1).points == pytest.approx(theirs.run(1).points, abs=1e-12)


def test_scaffold_without_controls_is_fedavg() -> None:
    fed, base = Federation("scaffold"), Federation("fedit")
    for _ in range(3):
        done = fed.train(CLIENTS)
        assert not any(bool(t.any()) for t in state_of(fed.server, "control").values())
        none = [replace(u, extra={n: t * 0.0 for n, t in u.extra.items()}) for u in done.updates]
        fed.finish(replace(done, updates=[replace(update, state={}) for update in none]))
        base.round()
        assert_same(dict(fed.server.adapter.tensors), dict(base.server.adapter.tensors), 1e-12)


def controls_of(fed: Federation, cid: int) -> dict[str, Tensor]:
    """Return a client's c_k."""
    prefix = note("control", "")
    held = fed.store.get(cid).items()
    return {n.removeprefix(prefix): t for n, t in held if n.startswith(prefix)}


def padded_to(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with zeros beyond its own rank."""
    larger = torch.zeros_like(like)
    larger[tuple(slice(length) for length in tensor.shape)] = tensor
    return larger


@each_option
@pytest.mark.parametrize("is_mixed", [False, True], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("cohort_size", [4, 2])
@pytest.mark.parametrize(
    ("method", "settings"),
    [(method, FITTING.get(method, {})) for method in DEFINED]
    + [("ravan", {"heads": 3, "trained_heads": 2})],
)
def test_c_is_the_mean_of_what_all_clients_hold(
    method: str, settings: dict[str, Any], option: str, is_mixed: bool, cohort_size: int
) -> None:
    # also of those that were absent or did not train a tensor: they hold what they held
    if is_mixed and server_class(method).mixed_rank == "unsupported":
        assert problems(method, {"optimizer": "scaffold"}, mixed_rank=True)
        return
    ranks = mixed_ranks() if is_mixed else RankRule((4,))
    settings = {**settings, "optimizer": "scaffold", "option": option}
    fed = Federation(method, settings, ranks=ranks, total_rounds=8)
    for _ in range(4):
        fed.round(fed.sampled(cohort_size))
        for name, control in state_of(fed.server, "control").items():
            own = [controls_of(fed, cid).get(name) for cid in CLIENTS]
            held = [padded_to(tensor, control) for tensor in own if tensor is not None]
            total = sum(held, start=torch.zeros_like(control))
            assert_same({name: control}, {name: total / len(CLIENTS)}, 1e-12)


def test_one_step_gives_both_options_the_same_controls() -> None:
    first, second = (
        Federation("scaffold", {"option": o}, engine=FakeEngine("quadratic"), steps=1).run(3)
        for o in ("I", "II")
    )
    for cid in CLIENTS:
        assert_same(controls_of(first, cid), controls_of(second, cid))


def test_option_two_divides_by_the_sum_of_the_learning_rates() -> None:
    server, client = make("scaffold", {"option": "II"})
    server.start(tiny(), RankRule((1,)), num_clients=2)
    (job,) = server.local_run([0])
    extra = {n: torch.full_like(t, 0.5) for n, t in job.payload.extra.items()}
    state = {note("control", n): torch.full_like(t, 0.125) for n, t in extra.items()}
    job = replace(job, payload=replace(job.payload, extra=extra), state=state)
    end = tiny().overlaid({n: t - 3.0 for n, t in tiny().tensors.items()})
    done = SharedPass(job, tiny(), FitResult(end, 4, {"rate_sum": 0.75}))
    assert isinstance(client, ControlClient)
    with pytest.raises(StopIteration) as stop:
        client.renewed(done, FakeEngine()).__await__().send(None)  # type: ignore[arg-type]
    wanted = 0.125 - 0.5 + 3.0 / 0.75
    for tensor in stop.value.value.values():
        assert torch.equal(tensor, torch.full_like(tensor, wanted))


@dataclass
class Watching(FakeEngine):
    """A quadratic engine that keeps the gradients that were asked for."""

    mode: Any = "quadratic"
    asked: list[FitRequest] = field(default_factory=list)

    def _gradient(self, request: FitRequest) -> FitResult:
        self.asked.append(request)
        return super()._gradient(request)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedit", {}),
        ("rolora", {}),
        ("ravan", {"heads": 2}),
        ("ditto", {}),
        ("feddpa-t", {}),
        ("pfedlora", {}),
        ("pfedlora", {"order": "global-first"}),
    ],
)
def test_option_one_asks_for_the_gradient_where_the_shared_pass_began(
    method: str, settings: dict[str, Any]
) -> None:
    engine = Watching()
    fed = Federation(method, {**settings, "optimizer": "scaffold"}, engine=engine, steps=1)
    fed.run(2)
    engine.asked.clear()
    done = fed.round((0, 3))
    assert [request.job.cid for request in engine.asked] == [0, 3]
    for request, update in zip(engine.asked, done.updates, strict=True):
        shared = [
            fit
            for fit, _ in done.fits
            if fit.job.cid == update.cid and fit.job.stage not in ("personal", "local")
        ]
        (fit,) = shared
        assert request.start.digest() == fit.start.digest()
        assert request.job.stage == fit.job.stage
        assert any(bool(t.any()) for t in controls_of(fed, update.cid).values())


@each_option
def test_the_controls_of_a_core_are_of_the_core_whatever_its_gain_became(option: str) -> None:
    # RAVAN sends s H; x_t - y is of H. In a first round H = 0, and s has no gradient
    fed = federation("ravan", "scaffold", option=option, engine=FakeEngine("quadratic"), steps=1)
    fed.learning_rate = 0.05
    fed.run(2)
    before = controls_of(fed, 0)
    done = fed.round([0])
    ((fit, result),) = done.fits
    gains = [name for name in fit.start if is_gain(name)]
    assert all(not torch.equal(result.adapter[name], fit.start[name]) for name in gains)
    cores = [name for name in fit.start if is_core(name)]
    for name in cores:
        slope = (fit.start[name] - result.adapter[name]) / 0.05
        wanted = slope - fit.job.payload.extra[name] + before[name]
        assert_same({name: controls_of(fed, 0)[name]}, {name: wanted})
    assert gains
    assert cores


def test_gradients_are_corrected_by_c_minus_the_own_control() -> None:
    fed = Federation("fedsa-lora", {"optimizer": "scaffold"}).run(3)
    (job,) = fed.jobs([1])
    grads = {n: noise(t.shape, "gradient", n) for n, t in fed.client.start(job).tensors.items()}
    found = fed.client.correct(grads, job)
    assert found is not None
    c, own = state_of(fed.server, "control"), controls_of(fed, 1)
    assert set(c) == set(own) == {n for n in grads if is_a(n)}  # B never travels
    wanted = {n: g + c[n] - own[n] if n in c else g for n, g in grads.items()}
    assert_same(dict(found), wanted, 1e-12)
    assert all(float((wanted[n] - grads[n]).norm()) > 1e-3 for n in c)


def test_a_correction_lies_where_the_gradients_lie() -> None:
    # a device other than the one that messages lie on; `meta` is at hand everywhere
    fed = Federation("scaffold").run(2)
    (job,) = fed.jobs([1])
    grads = {n: t.to("meta") for n, t in job.payload.adapter.tensors.items()}
    found = fed.client.correct(grads, job)
    assert found is not None
    assert all(tensor.is_meta for tensor in found.values())


@pytest.mark.parametrize("method", ["rolora", "ffa-lora", "fedsa-lora"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_a_server_step_leaves_what_was_not_sent(method: str, eta: float) -> None:
    # a tensor that is touched would have to travel again
    settings = {"optimizer": "scaffold", "server_learning_rate": eta}
    fed, base = Federation(method, settings), Federation(method)
    for _ in range(3):
        before = fed.server.adapter
        done = fed.round()
        base.round()
        sent = {name for update in done.updates for name in update.adapter}
        assert 0 < len(sent) < len(before)
        assert all(fed.server.adapter[n] is before[n] for n in before if n not in sent)
        assert fed.server.changed == base.server.changed


@pytest.mark.parametrize("method", ["fine-tune", "feddpa-f"])
def test_controls_do_not_travel_while_all_train_their_own(method: str) -> None:
    fed = Federation(method, {"optimizer": "scaffold"}, total_rounds=3)
    sizes = [[len(job.payload.extra) for job in fed.round().jobs] for _ in range(3)]
    assert all(size > 0 for size in sizes[0] + sizes[1])
    assert sizes[2] == [0] * 4


def test_a_client_receives_c_at_its_own_rank() -> None:
    fed = Federation("ffa-lora", {"optimizer": "scaffold"}, ranks=mixed_ranks()).run(2)
    for job in fed.jobs(CLIENTS):
        assert {n for n in job.payload.adapter if n not in job.payload.known} == set(
            job.payload.extra
        )
        for name, tensor in job.payload.extra.items():
            assert tensor.shape == job.payload.adapter[name].shape
            whole = state_of(fed.server, "control")[name]
            assert torch.equal(tensor, whole[tuple(slice(n) for n in tensor.shape)])


def settings_for(optimizer: str, **training: Any) -> dict[str, Any]:
    """Return a configuration with option II."""
    algorithm = {"name": "scaffold", "option": "II"}
    if optimizer:
        training["optimizer"] = optimizer
    return {"algorithm": algorithm, "training": training}


@pytest.mark.parametrize(
    ("optimizer", "training", "told"),
    [("adamw", {}, "adamw"), ("", {}, "adamw"), ("sgd", {"momentum": 0.9}, "sgd with momentum")],
)
def test_option_two_is_refused_where_a_step_is_not_the_rate_times_the_gradient(
    optimizer: str, training: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(settings_for(optimizer, **training))
    (problem,) = [line for line in caught.value.problems if "option" in line]
    assert f"not for {told};" in problem
    composed_pair = {"optimizer": "scaffold", "option": "II"}
    assert problems("rolora", composed_pair, local_optimizer="adamw")
    assert problems("rolora", composed_pair) == []


def test_option_two_goes_with_plain_sgd_and_option_one_with_anything() -> None:
    assert make_config(settings_for("sgd")).algorithm.settings["option"] == "II"
    for optimizer in ("sgd", "adamw"):
        config = {"algorithm": "scaffold", "training": {"optimizer": optimizer}}
        assert make_config(config).algorithm.name == "scaffold"


@pytest.mark.parametrize("method", ["fedit", "rolora", "ravan", "ditto", "pfedlora"])
def test_on_a_model_one_whole_batch_gives_both_options_the_same_controls(
    method: str, tiny_model: Callable[[str], Path]
) -> None:
    training = TrainingConfig(batch_size=64, optimizer="sgd", max_grad_norm=0.0)
    world = make_world(tiny_model("llama"), training=training)
    found = []
    for option in ("I", "II"):
        server, client = make(method, {"optimizer": "scaffold", "option": option})
        start = world.resident.initial_adapter(4, 1.5, 3)
        server.start(start, RankRule((4,)), num_clients=4, rounds=2, seed=5)
        states: dict[int, Mapping[str, Tensor]] = {}
        for _ in range(2):
            jobs = [
                replace(job, seed=1, steps=1, learning_rate=0.5, num_samples=8)
                for job in server.local_run([0, 1])
            ]
            jobs = [replace(job, state=states.get(job.cid, {})) for job in jobs]
            updates = InlineExecutor(world.engine, client).run(jobs)
            states |= {update.cid: update.state for update in updates}
            server.apply([Part(1.0, update) for update in updates])
        found.append(state_of(server, "control"))
    first, second = found
    assert all(bool(t.isfinite().all()) for t in first.values())
    assert any(float(t.norm()) > 1e-3 for t in first.values())
    assert_same(first, second, 1e-4)


# 5.3 FedAvgM


def test_fedavgm_without_momentum_is_fedavg() -> None:
    fed = Federation("fedavgm", {"momentum": 0.0, "server_learning_rate": 1.0})
    base = Federation("fedit")
    for cohort in [(0, 1, 2, 3), (1, 2), (0, 3)]:
        fed.round(cohort)
        base.round(cohort)
        assert_same(dict(fed.server.adapter.tensors), dict(base.server.adapter.tensors), 1e-12)


def test_a_constant_change_moves_fedavgm_by_it_over_one_minus_beta() -> None:
    server, change = started("fedavgm", momentum=0.9, server_learning_rate=0.5), changes(0)
    velocity = 0.0
    for _ in range(400):
        gone = moved_by(server, change)
        velocity = 0.9 * velocity + 1.0
        assert_same(gone, {n: t * 0.5 * velocity for n, t in change.items()})
    assert_same(gone, {n: t * 0.5 / (1 - 0.9) for n, t in change.items()})


# 5.4 FedAdagrad, FedAdam, FedYogi


def by_hand(
    name: str, rounds: Sequence[Mapping[str, Tensor]], b1: float, b2: float, tau: float, eta: float
) -> list[dict[str, Tensor]]:
    """Return how far each round goes, written out from the paper."""
    gone: list[dict[str, Tensor]] = []
    m = {n: torch.zeros_like(t) for n, t in rounds[0].items()}
    v = {n: torch.full_like(t, tau**2) for n, t in rounds[0].items()}
    for change in rounds:
        step = {}
        for n, d in change.items():
            m[n] = b1 * m[n] + (1 - b1) * d
            if name == "fedadagrad":
                v[n] = v[n] + d**2
            elif name == "fedadam":
                v[n] = b2 * v[n] + (1 - b2) * d**2
            else:
                v[n] = v[n] - (1 - b2) * d**2 * torch.sign(v[n] - d**2)
            step[n] = eta * m[n] / (torch.sqrt(v[n]) + tau)
        gone.append(step)
    return gone


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("tau", [1e-3, 0.7])
def test_moments_follow_the_paper(name: str, b1: float, tau: float) -> None:
    # sizes that grow and shrink, so that Yogi meets both signs
    rounds = [changes(number, size) for number, size in enumerate((1.0, 0.1, 3.0, 0.01, 1.0))]
    settings = {} if name == "fedadagrad" else {"beta2": 0.8}
    server = started(name, beta1=b1, tau=tau, server_learning_rate=0.3, **settings)
    for change, wanted in zip(rounds, by_hand(name, rounds, b1, 0.8, tau, 0.3), strict=True):
        assert_same(moved_by(server, change), wanted)


@pytest.mark.parametrize("name", MOMENTS)
def test_the_defaults_are_the_papers(name: str) -> None:
    server = started(name)
    change = changes(1)
    b1 = 0.0 if name == "fedadagrad" else 0.9
    (wanted,) = by_hand(name, [change], b1, 0.99, 1e-3, 0.01)
    assert_same(moved_by(server, change), wanted)


@pytest.mark.parametrize("name", SERVER_SIDE)
def test_no_change_at_all_leaves_the_model(name: str) -> None:
    server = started(name)
    before = server.adapter.digest()
    for _ in range(3):
        moved_by(server, {n: t * 0.0 for n, t in changes(0).items()})
    assert server.adapter.digest() == before


def test_the_first_step_of_fedadam_has_a_size_in_closed_form() -> None:
    b2, tau, eta = 0.95, 0.02, 0.4
    server = started("fedadam", beta1=0.0, beta2=b2, tau=tau, server_learning_rate=eta)
    change = changes(2)
    wanted = {
        n: eta * d.abs() / ((b2 * tau**2 + (1 - b2) * d**2).sqrt() + tau) for n, d in change.items()
    }
    gone = moved_by(server, change)
    assert_same({n: t.abs() for n, t in gone.items()}, wanted)
    assert all(torch.equal(gone[n].sign(), change[n].sign()) for n in change)


def test_yogi_and_adam_agree_where_v_is_the_square_of_the_change_and_only_there() -> None:
    tau = 0.25  # all numbers are sums of powers of two: v - D^2 is exactly 0 where it should be
    signs = {n: t.sign() for n, t in changes(3).items()}
    for factor, agree in ((1.0, True), (2.0, False), (0.5, False)):
        change = {n: t * tau * factor for n, t in signs.items()}  # v_0 = tau^2
        adam, yogi = (
            moved_by(started(name, is_zero=True, tau=tau, beta2=0.5), change)
            for name in ("fedadam", "fedyogi")
        )
        gaps = [float((adam[n] - yogi[n]).abs().max()) for n in change]
        assert all((gap < 1e-12) == agree for gap in gaps)


def test_the_second_moment_of_adagrad_never_falls_and_that_of_adam_does() -> None:
    falls = {}
    for name in ("fedadagrad", "fedadam"):
        server = started(name, tau=0.5)
        seen = []
        for number in range(12):
            moved_by(server, changes(number, size=1.0 / (number + 1)))
            seen.append(dict(state_of(server, "second_moment")))
        steps = [
            float((now[n] - was[n]).min()) for was, now in itertools.pairwise(seen) for n in now
        ]
        falls[name] = min(steps)
    assert falls["fedadagrad"] >= 0
    assert falls["fedadam"] < 0


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi"])
def test_a_large_tau_with_twice_that_rate_is_fedavg(name: str) -> None:
    tau = 1e6
    settings = {"beta1": 0.0, "tau": tau, "server_learning_rate": 2 * tau}
    fed, base = Federation(name, settings), Federation("fedit")
    for cohort in [(0, 1, 2, 3), (1, 2), (0, 3)]:
        fed.round(cohort)
        base.round(cohort)
        assert_same(dict(fed.server.adapter.tensors), dict(base.server.adapter.tensors), 1e-6)
    adam = started("fedadam", **settings)  # which forgets v_0 = tau^2: another limit
    change = changes(0)
    gone = moved_by(adam, change)
    assert_same(gone, {n: t * 2 / (0.99**0.5 + 1) for n, t in change.items()}, 1e-6)


@pytest.mark.parametrize("name", SERVER_SIDE)
def test_each_half_of_rolora_has_moments_that_rest_with_it(name: str) -> None:
    fed = Federation("rolora", {"optimizer": name})
    for number in range(6):
        before, moments = fed.server.adapter, dict(state_of(fed.server, "first_moment"))
        fed.round()
        after = state_of(fed.server, "first_moment")
        rests = is_a if number % 2 == 0 else is_b
        resting = [n for n in before if rests(n)]
        assert all(fed.server.adapter[n] is before[n] for n in resting)
        assert all(after.get(n) is moments.get(n) for n in resting)
        assert all(
            not torch.equal(after[n], moments.get(n, after[n] * 0)) for n in after if not rests(n)
        )
    assert set(after) == set(before)


@pytest.mark.parametrize("name", SERVER_SIDE)
@pytest.mark.parametrize(
    ("method", "moves"),
    [
        ("fedit", lambda n: True),
        ("ffa-lora", lambda n: is_b(n) or n == HEAD),
        ("fedsa-lora", is_a),
        ("ravan", lambda n: is_core(n) or n == HEAD),
    ],
)
def test_all_shared_tensors_have_moments_and_no_other(
    method: str, moves: Callable[[str], bool], name: str
) -> None:
    fed = federation(method, name)
    start = fed.server.adapter
    fed.run(3)
    assert set(state_of(fed.server, "first_moment")) == {n for n in start if moves(n)}
    for n in start:
        assert torch.equal(fed.server.adapter[n], start[n]) == (not moves(n))


# composition


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimiser_alone_goes_with_fedit(optimizer: str) -> None:
    alone = Federation(optimizer).run(3, cohort_size=3)
    pair = Federation("fedit", {"optimizer": optimizer}).run(3, cohort_size=3)
    assert tensors_of(alone) == tensors_of(pair)


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_an_optimiser_changes_what_its_method_does_and_keeps_what_it_promises(
    method: str, optimizer: str
) -> None:
    settings = {"mu": 0.5} if optimizer == "fedprox" else {}
    fed = federation(method, optimizer, **settings).run(3)
    assert fed.server.adapter.digest() != federation(method).run(3).server.adapter.digest()
    assert all(bool(t.isfinite().all()) for t in fed.views().values())
    own, pair = server_class(method), type(fed.server)
    assert issubclass(pair, own)
    assert issubclass(pair, server_class(optimizer))
    for promise in ("mixed_rank", "is_personal", "recoordinated", "has_mean", "is_random_cohort"):
        assert getattr(pair, promise) == getattr(own, promise)


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_a_pair_has_the_settings_and_defaults_of_both(method: str, optimizer: str) -> None:
    def defaults(cls: type[BaseServer]) -> dict[str, Any]:
        return {f.name: f.default for f in fields(cls) if f.init}

    pair = server_class(method, optimizer)
    both = {**defaults(server_class(optimizer)), **defaults(server_class(method))}
    assert defaults(pair) == both
    assert set(settings_of(pair)) == set(both)
    server, _ = make(method, {"optimizer": optimizer, "weights": "uniform"})
    assert server.weights == "uniform"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_setting_or_state_of_a_method_has_the_name_of_an_optimisers(
    method: str, optimizer: str
) -> None:
    common = {f.name for f in fields(BaseServer)}
    named = [{f.name for f in fields(server_class(n))} - common for n in (method, optimizer)]
    clash = named[0] & named[1]
    assert clash == set() or (method in UNDEFINED and clash == {"control"})  # ILoRA has its own
    assert "optimizer" not in named[0] | named[1] | common  # the key is taken
    assert "name" not in named[0] | named[1] | common


def test_equal_pairs_have_the_same_classes_and_unequal_ones_do_not() -> None:
    targets = [ALGORITHMS[n].target for n in ("rolora", "fedadam", "fedyogi")]
    for made in (composed, client_class):
        first = made(targets[0], targets[1])
        assert made(targets[0], targets[1]) is first
        assert made(targets[0], targets[2]) is not first
        assert made(targets[0], None) is not first


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_a_client_comes_back_from_a_pickle_as_it_was(method: str, optimizer: str) -> None:
    for head in ("shared", "local", "frozen"):
        _, client = make(method, {"optimizer": optimizer}, head)  # type: ignore[arg-type]
        again = pickle.loads(pickle.dumps(client))
        assert type(again) is type(client)
        assert again.head == head


def test_the_specification_says_which_pairs_are_defined() -> None:
    assert {"fedit", "ffa-lora", "fedsa-lora", "ravan", "rolora"} <= set(DEFINED)
    spelled = {"flora", "flexlora", "fedex-lora", "fedmomentum", "fedsvd", "ilora", "hilora"}
    assert spelled <= set(UNDEFINED)
    assert set(UNDEFINED) <= set(METHODS)


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_a_defined_pair_is_accepted(method: str, optimizer: str) -> None:
    assert problems(method, {"optimizer": optimizer}) == []


@pytest.mark.parametrize("method", UNDEFINED)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_undefined_pair_is_refused_with_the_reason(method: str, optimizer: str) -> None:
    (told,) = problems(method, {"optimizer": optimizer})
    why = server_class(method).recoordinated
    assert why
    assert told == f"algorithm.optimizer: '{optimizer}' is not defined on '{method}': {why}"
    with pytest.raises(ConfigError, match=f"is not defined on '{method}'"):
        make(method, {"optimizer": optimizer})
    # its settings are not a second mistake, but one of the method's own would be
    assert problems(method, {"optimizer": optimizer, "server_learning_rate": 0.1}) == [told]
    assert len(problems(method, {"optimizer": optimizer, "wieghts": "uniform"})) == 2


@pytest.mark.parametrize("method", OPTIMIZERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimiser_goes_with_no_optimiser(method: str, optimizer: str) -> None:
    (told,) = problems(method, {"optimizer": optimizer})
    assert f"'{method}' is an optimiser itself" in told


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"optimizer": "fedadm"}, "Did you mean 'fedadam'?"),
        ({"optimizer": "fedadm", "tau": 0.1}, "Did you mean 'fedadam'?"),
        ({"optimizer": "fedit"}, "Unknown optimizer 'fedit'"),
        ({"optimizer": 3}, "Unknown optimizer '3'"),
        ({"optimizer": "fedadam", "taw": 1.0}, "algorithm.taw: unknown key. Did you mean 'tau'?"),
        ({"optimizer": "fedadam", "tau": 0.0}, "algorithm.tau: "),
        ({"optimizer": "fedadam", "flip_every": 0}, "algorithm.flip_every: "),
        ({"optimizer": "fedprox", "mu": -1.0}, "algorithm.mu: "),
        ({"optimizer": "fedavgm", "momentum": 1.0}, "algorithm.momentum: "),
        ({"optimizer": "scaffold", "option": "III"}, "algorithm.option: "),
        ({"tau": 0.1}, "algorithm.tau: unknown key"),
        ({"optimiser": "fedadam"}, "Did you mean 'optimizer'?"),
    ],
)
def test_a_wrong_optimiser_or_setting_is_told_in_one_sentence(
    settings: dict[str, Any], part: str
) -> None:
    (told,) = problems("rolora", settings)
    assert part in told


def test_a_pair_of_a_configuration_arrives_with_the_settings_of_both() -> None:
    settings = {"optimizer": "fedadam", "server_learning_rate": 0.05, "flip_every": 3}
    config = make_config({"algorithm": {"name": "rolora", **settings}})
    assert config.algorithm.name == "rolora"
    fed = Federation(config.algorithm.name, config.algorithm.settings)
    (job,) = fed.jobs([0])
    wanted = {"server_learning_rate": 0.05, "flip_every": 3, "tau": 1e-3, "weights": "samples"}
    assert {key: job.settings[key] for key in wanted} == wanted
