"""Which codecs, robust rules and noise go with which algorithm; every refusal says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_world import call, fails

from fedllm import algorithms
from fedllm.adapters.wire import WIRE
from fedllm.algorithms import ALGORITHMS, OPTIMIZERS, server_class
from fedllm.errors import ConfigError
from fedllm.experiment import make_config
from fedllm.federation import BaseClient
from fedllm.federation.robust import ROBUST

PRIVACY = {"clip": 1.0, "noise_multiplier": 1.0}
RULES: dict[str, Any] = {
    "mean": "mean",
    "median": "median",
    "trimmed-mean": {"name": "trimmed-mean", "share": 0.1},
    "krum": {"name": "krum", "byzantine": 1},
    "multi-krum": {"name": "multi-krum", "byzantine": 1, "keep": 2},
    "norm-bound": {"name": "norm-bound", "bound": 1.0},
}
each_algorithm = pytest.mark.parametrize("name", list(ALGORITHMS))


def problems_of(tree: dict[str, Any]) -> list[str]:
    """Return every problem of a configuration."""
    try:
        make_config(tree)
    except ConfigError as error:
        return list(error.problems)
    return []


def sends_beside(name: str) -> bool:
    _, client = algorithms.make(name, {})
    return type(client).extra_names is not BaseClient.extra_names


# algorithm by algorithm


@each_algorithm
def test_where_tensors_cannot_be_subtracted_nothing_that_subtracts_is_taken(name: str) -> None:
    why = server_class(name).recoordinated
    tree = {
        "algorithm": name,
        "communication": {"uplink": "topk"},
        "updates": {"robust": RULES["norm-bound"], "privacy": PRIVACY},
    }
    keys = ("updates.robust", "updates.privacy", "communication.uplink")
    refused = [f"{key}: not defined for '{name}': {why}" for key in keys] if why else []
    found = problems_of(tree)
    assert found[: len(refused)] == refused
    others = found[len(refused) :]
    assert len(others) == int(sends_beside(name))
    assert all("control variates" in problem for problem in others)


@each_algorithm
@pytest.mark.parametrize("rule", list(ROBUST))
def test_a_rule_is_taken_or_refused_with_a_reason(name: str, rule: str) -> None:
    found = problems_of({"algorithm": name, "updates": {"robust": RULES[rule]}})
    is_odd = bool(server_class(name).recoordinated) and rule != "mean"
    is_combined = sends_beside(name) and rule in {"median", "trimmed-mean"}
    takes_turns = not server_class(name).is_random_cohort and rule in {"krum", "multi-krum"}
    assert len(found) == is_odd + is_combined + takes_turns
    assert all(problem.startswith("updates.robust: ") for problem in found)


@each_algorithm
@pytest.mark.parametrize("codec", [name for name in WIRE if name != "topk"])
def test_every_algorithm_goes_through_every_codec_of_values(name: str, codec: str) -> None:
    tree = {"algorithm": name, "communication": {"uplink": codec, "downlink": codec}}
    assert problems_of(tree) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_beside_a_method_changes_what_is_refused_only_if_it_sends_more(
    optimizer: str,
) -> None:
    tree = {"algorithm": {"name": "rolora", "optimizer": optimizer}, "updates": {}}
    tree["updates"] = {"privacy": PRIVACY}
    found = problems_of(tree)
    assert len(found) == int(optimizer == "scaffold")
    assert all("control variates" in problem for problem in found)


@pytest.mark.parametrize("beside", [{}, {"optimizer": "scaffold"}])
@pytest.mark.parametrize("rule", list(ROBUST))
def test_what_clients_choose_to_train_is_not_compared(beside: dict[str, str], rule: str) -> None:
    def found(heads: int) -> list[str]:
        method = {"name": "ravan", "heads": 4, "trained_heads": heads, **beside}
        return problems_of({"algorithm": method, "updates": {"robust": RULES[rule]}})

    told = [problem for problem in found(2) if problem not in found(4)]
    assert len(told) == int(rule in {"krum", "multi-krum"})
    assert all("updates.robust: not defined where each client trains" in t for t in told)


def test_no_noise_hides_which_heads_a_client_trained() -> None:
    for heads, refusals in ((2, 1), (4, 0)):
        method = {"name": "ravan", "heads": 4, "trained_heads": heads}
        found = problems_of({"algorithm": method, "updates": {"privacy": PRIVACY}})
        assert len(found) == refusals


# single refusals


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        (
            {"algorithm": "cyclic", "updates": {"robust": RULES["krum"]}},
            ["updates.robust: 'krum'", "a cohort of at least 5", "'cyclic' takes 1 at a time"],
        ),
        (
            {"federation": {"cohort_size": 5}, "updates": {"robust": RULES["multi-krum"]}}
            | {"algorithm": "fedit"},
            [],
        ),
        (
            {
                "federation": {"num_clients": 50, "cohort_size": 6},
                "updates": {"robust": {"name": "multi-krum", "byzantine": 2, "keep": 3}},
            },
            ["at least 7", "federation.cohort_size is 6"],
        ),
        (
            {
                "algorithm": "ffa-lora",
                "adapter": {"rank": [2, 4]},
                "updates": {"privacy": PRIVACY},
            },
            ["updates.privacy: clients of unequal rank"],
        ),
        (
            {
                "algorithm": "ffa-lora",
                "adapter": {"rank": [2, 4]},
                "updates": {"robust": RULES["norm-bound"]},
            },
            [],
        ),
        (
            {"updates": {"privacy": PRIVACY, "robust": RULES["krum"]}},
            ["'krum' looks at clients before noise is added"],
        ),
        ({"updates": {"privacy": {"clip": 1.0}}}, ["updates.privacy.noise_multiplier"]),
        (
            {"updates": {"privacy": {**PRIVACY, "noise_multiplier": -1}}},
            ["updates.privacy.noise_multiplier"],
        ),
        ({"updates": {"privacy": {**PRIVACY, "delta": 1}}}, ["updates.privacy.delta"]),
        (
            {"updates": {"privacy": {**PRIVACY, "noise": 1}}},
            ["updates.privacy.noise", "noise_multiplier"],
        ),
        ({"updates": {"max_norm": 0}}, ["updates.max_norm"]),
        ({"updates": {"max_nrm": 3}}, ["updates.max_nrm", "max_norm"]),
        (
            {"communication": {"uplink": {"name": "int8", "share": 0.5}}},
            ["communication.uplink.share: unknown key", "no settings"],
        ),
        (
            {"communication": {"uplink": {"name": "topk", "shre": 0.5}}},
            ["communication.uplink.shre: unknown key", "share"],
        ),
        ({"communication": {"uplink": {"share": 0.5}}}, ["communication.uplink"]),
        ({"communication": {"uplink": 8}}, ["communication.uplink"]),
        (
            {"updates": {"robust": {"name": "trimmed-mean", "share": 0.5}}},
            ["updates.robust.share", "less than 0.5"],
        ),
        (
            {"updates": {"robust": {"name": "trimmed-mean", "share": "0.1"}}},
            ["updates.robust.share", "'0.1'"],
        ),
        ({"updates": {"robust": "norm-bound"}}, ["updates.robust.bound", "needs a value"]),
    ],
)
def test_a_refusal_names_the_key_and_the_reason(tree: dict[str, Any], parts: list[str]) -> None:
    found = problems_of(tree)
    assert len(found) == min(len(parts), 1)
    for part in parts:
        assert part in found[0]


def test_all_faults_are_told_at_once_whatever_their_kind() -> None:
    tree = {
        "algorithm": {"name": "fedit", "heads": 3},
        "training": {"batch_size": 0},
        "communication": {"uplink": "int9", "downlink": {"name": "nf4", "block": 32}},
        "updates": {"robust": "krun", "privacy": {"clip": -1, "noise_multiplier": 1}},
        "evaluation": {"metrics": ["acuracy"]},
    }
    found = problems_of(tree)
    for key in (
        "algorithm.heads",
        "training.batch_size",
        "communication.uplink",
        "communication.downlink.block",
        "updates.robust",
        "updates.privacy.clip",
        "evaluation.metrics",
    ):
        assert sum(problem.startswith(key) for problem in found) == 1, key
    assert len(found) == 7


@pytest.mark.parametrize(
    "sections",
    [
        {"communication": 3},
        {"updates": ["median"]},
        {"communication": {"uplink": {3: 4, "name": "topk"}}},
        {"updates": {"robust": None}},
        {"communication": {"uplink": {"name": ["int8"]}}},
    ],
)
def test_what_has_no_form_at_all_is_told_by_the_schema_alone(sections: dict[str, Any]) -> None:
    (section,) = sections
    found = problems_of(sections)
    assert found
    assert all(problem.startswith(section) for problem in found)


# from the command line


@pytest.mark.parametrize("command", ["run", "check"])
def test_the_command_line_tells_every_refusal_in_one_message(command: str, tmp_path: Path) -> None:
    tree = {
        "name": "one",
        "output_dir": str(tmp_path / "runs"),
        "algorithm": "flexlora",
        "communication": {"uplink": "topk"},
        "updates": {"robust": "median", "privacy": PRIVACY},
    }
    file = tmp_path / "refused.yaml"
    file.write_text(yaml.safe_dump(tree))
    text = " ".join(fails(command, file).split())
    why = "not defined for 'flexlora': its factors are refactored by SVD every round"
    for key in ("updates.robust", "updates.privacy", "communication.uplink"):
        assert f"{key}: {why}" in text
    assert "looks at clients before noise is added" in text
    assert "4 problems" in text
    assert not (tmp_path / "runs").exists()


def test_words_of_the_command_line_reach_the_sections(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(yaml.safe_dump({"name": "plain", "output_dir": str(tmp_path / "runs")}))
    text = fails("check", file, "communication.uplink={name: topk, share: 7}")
    assert "communication.uplink.share" in text
    code, text = call("check", file, "communication.uplink=nf4", "updates.robust=median")
    assert code == 0, text
