"""What `fedllm list algorithms` and programs are told of each algorithm."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal

import pytest
from cli_world import call
from pydantic import Field

from fedllm.algorithms import ALGORITHMS, OPTIMIZERS, problems, server_class, settings_of
from fedllm.algorithms.catalog import describe, type_text
from fedllm.errors import ConfigError


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_optimisers_named_are_those_that_a_configuration_may_name(name: str) -> None:
    found = describe(name)
    accepted = [o for o in OPTIMIZERS if not problems(name, {"optimizer": o})]
    assert list(found.optimizers) == accepted
    assert bool(found.no_optimizer) == (not accepted)
    for optimizer in set(OPTIMIZERS) - set(accepted):
        (told,) = problems(name, {"optimizer": optimizer})
        assert found.no_optimizer.removeprefix("it ") in told


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_settings_are_named_with_the_defaults_that_hold(name: str) -> None:
    cls = server_class(name)
    found = describe(name)
    assert set(found.settings) == set(settings_of(cls))
    made = cls()
    assert {k: s["default"] for k, s in found.settings.items()} == {
        f.name: getattr(made, f.name) for f in fields(cls) if f.init
    }
    assert not any(setting["default"] is MISSING for setting in found.settings.values())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_paper_is_one_line_and_not_the_rest_of_the_docstring(name: str) -> None:
    paper = describe(name).paper
    assert paper
    assert "\n" not in paper
    assert not any(f"{word}:" in paper for word in ("Box", "Fields", "Evidence"))


def test_the_paper_of_an_algorithm_is_read_over_line_ends() -> None:
    assert describe("fedadam").paper == (
        'Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295.'
    )
    assert describe("fedavgm").paper.endswith("2019, arXiv:1909.06335.")


def test_an_unknown_algorithm_is_not_described() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'fedadam'"):
        describe("fedadm")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "int"),
        (Annotated[int, Field(ge=1)], "int"),
        (Annotated[int, Field(ge=1)] | None, "int | null"),
        (Literal["a", "b"], "a | b"),
        (float | None, "float | null"),
        (bool, "bool"),
    ],
)
def test_types_read_as_in_yaml(kind: Any, text: str) -> None:
    assert type_text(kind) == text


def test_json_holds_all_that_is_known() -> None:
    code, text = call("list", "algorithms", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(text)}
    assert list(rows) == list(ALGORITHMS)
    for name, row in rows.items():
        found = describe(name)
        assert row == {
            "name": name,
            "what": found.summary,
            "mixed_rank": found.mixed_rank,
            "personal": found.is_personal,
            "async": not found.schedules["async"],
            "optimizers": list(found.optimizers),
            "no_optimizer": found.no_optimizer,
            "schedules": dict(found.schedules),
            "settings": found.settings,
            "paper": found.paper,
        }
    assert rows["rolora"]["optimizers"] == list(OPTIMIZERS)
    assert rows["flexlora"]["optimizers"] == []
    assert "SVD" in rows["flexlora"]["no_optimizer"]


def test_the_list_fits_in_a_hundred_columns_and_cuts_nothing_off() -> None:
    code, text = call("list", "algorithms")
    assert code == 0
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    head = next(line for line in lines if line.strip())
    assert head.split() == ["name", "what", "mixed", "rank", "personal", "async"]
    for name, entry in ALGORITHMS.items():
        found = describe(name)
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert entry.summary in line
        told = (found.is_personal, not found.schedules["async"])
        yes = ["yes" if given else "no" for given in told]
        assert line.split()[-3:] == [found.mixed_rank, *yes]
    assert "residual_rank: int | null (default null)" in text
    assert "controls: bool (default true)" in text
