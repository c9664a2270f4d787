"""The configuration: numbers, overrides, shorthands, and every fault in one error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.algorithms import ALGORITHMS, server_class
from fedllm.config import Config, apply_overrides, dump, read, validate
from fedllm.errors import ConfigError
from fedllm.experiment import load_config, make_config


def problems(tree: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_config(tree, overrides)
    return caught.value.problems


def only_problem(tree: dict[str, Any], *overrides: str) -> str:
    (problem,) = problems(tree, *overrides)
    return problem


def test_nothing_at_all_is_the_default_run() -> None:
    assert make_config({}) == Config()


# unknown words


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("fedration", "federation"),
        ("federation.num_client", "num_clients"),
        ("training.lerning_rate", "learning_rate"),
        ("federation.partition.alhpa", "alpha"),
        ("algorithm.weigths", "weights"),
    ],
)
def test_an_unknown_key_gets_a_suggestion_at_its_place(key: str, meant: str) -> None:
    problem = only_problem({}, f"{key}=1")
    assert problem.startswith(f"{key}: unknown key")
    assert f"'{meant}'" in problem


def test_an_unknown_key_that_resembles_nothing_gets_the_known_ones() -> None:
    problem = only_problem({"checkpoint": {"zzz": 1}})
    assert problem == "checkpoint.zzz: unknown key. Known here: every, keep"


@pytest.mark.parametrize(
    ("word", "place", "meant"),
    [
        ("algorithm=flexlroa", "algorithm.name", "flexlora"),
        ("algorithm.name=fedti", "algorithm.name", "fedit"),
        ("federation.partition.name=dirichelt", "federation.partition.name", "dirichlet"),
        ("training.optimizer=adam", "training.optimizer", "adamw"),
        ("evaluation.metrics=[loss, final_numbr]", "evaluation.metrics", "final_number"),
        ("data.task=clasification", "data.task", "classification"),
    ],
)
def test_an_unknown_value_gets_a_suggestion_at_its_place(word: str, place: str, meant: str) -> None:
    problem = only_problem({}, word)
    assert problem.startswith(f"{place}: ")
    assert f"Did you mean '{meant}'?" in problem


def test_all_faults_are_told_at_once() -> None:
    tree = {
        "seed": -1,
        "nmae": "x",
        "algorithm": {"name": "fedit", "wieghts": "samples"},
        "adapter": {"rank": [2, 4], "dropout": 1.5},
        "training": {"batch_size": 0},
        "evaluation": {"metrics": ["los"]},
    }
    found = problems(tree)
    places = sorted(line.split(":")[0] for line in found)
    assert places == [
        "adapter.dropout",
        "adapter.rank",
        "algorithm.wieghts",
        "evaluation.metrics",
        "nmae",
        "seed",
        "training.batch_size",
    ]
    assert all("\n" not in line for line in found)


def test_the_error_counts_its_faults_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("seed: -1\nnmae: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"2 problems in {path}:"
    assert lines == [f"  - {problem}" for problem in caught.value.problems]


def test_a_wrong_value_is_quoted() -> None:
    assert "(got 'many')" in only_problem({"federation": {"rounds": "many"}})
    assert "(got 0)" in only_problem({"training": {"batch_size": 0}})
    assert "(got None)" in only_problem({"federation": {"num_clients": None}})


@pytest.mark.parametrize("tree", [{"model": "gpt2"}, {"training": [1]}, {"algorithm": 3}])
def test_a_section_that_is_no_mapping_is_refused_at_its_place(tree: dict[str, Any]) -> None:
    assert only_problem(tree).startswith(next(iter(tree)))


# rules between keys


def test_epochs_and_steps_exclude_each_other() -> None:
    problem = only_problem({"training": {"local_epochs": 2, "local_steps": 5}})
    assert problem == "training: give either local_epochs or local_steps, not both"


def test_a_cohort_is_not_larger_than_the_population() -> None:
    problem = only_problem({"federation": {"num_clients": 3, "cohort_size": 4}})
    assert problem == "federation: cohort_size 4 is larger than num_clients 3"
    assert make_config({"federation": {"num_clients": 3}}).federation.cohort == 3


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_mixed_ranks_are_refused_exactly_where_an_algorithm_cannot_have_them(name: str) -> None:
    tree = {"algorithm": name, "adapter": {"rank": [2, 4]}}
    if server_class(name).mixed_rank == "unsupported":
        assert only_problem(tree).startswith(f"adapter.rank: '{name}' needs one rank")
    else:
        assert make_config(tree).adapter.max_rank == 4


def test_a_list_of_one_rank_is_not_mixed() -> None:
    assert make_config({"algorithm": "fedit", "adapter": {"rank": [4, 4]}}).adapter.max_rank == 4
    assert only_problem({"adapter": {"rank": []}}).startswith("adapter")


def test_algorithms_settings_are_checked_by_their_type() -> None:
    assert only_problem({"algorithm": {"weights": 3}}).startswith("algorithm.weights: ")
    assert make_config({"algorithm": {"weights": "uniform"}}).algorithm.settings == {
        "weights": "uniform"
    }


@pytest.mark.parametrize("name", ["a/b", "../x", "", ".hidden", "a b"])
def test_a_run_cannot_be_named_out_of_its_folder(name: str) -> None:
    assert only_problem({"name": name}).startswith("name: ")


# shorthands and numbers


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_algorithm_is_given_by_its_name_alone(name: str) -> None:
    assert make_config({"algorithm": name}) == make_config({"algorithm": {"name": name}})


def test_settings_laid_over_an_algorithms_name_keep_the_name() -> None:
    config = make_config({"algorithm": "flora"}, ["algorithm.weights=uniform"])
    assert config.algorithm.name == "flora"
    assert config.algorithm.settings == {"weights": "uniform"}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "1.0e-3", "+1e-3"])
def test_a_number_is_read_however_it_is_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"training:\n  learning_rate: {text}\n  betas: [0.9, 999e-3]\n")
    for config in (load_config(path), make_config({}, [f"training.learning_rate={text}"])):
        assert config.training.learning_rate == 1e-3
    assert load_config(path).training.betas == (0.9, 0.999)


@pytest.mark.parametrize("word", ["12e4567", "1e-3", "7edges", "0x10", "null", "2020-01-01"])
def test_a_word_in_quotes_stays_a_word(word: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: '{word}'\nmodel: {{revision: \"{word}\"}}\n")
    config = load_config(path)
    assert (config.name, config.model.revision) == (word, word)
    assert make_config({}, [f"name='{word}'"]).name == word


# overrides


def test_overrides_reach_every_depth_and_the_last_one_holds() -> None:
    tree = {"federation": {"partition": {"alpha": 1.0}, "rounds": 3}}
    words = ["federation.partition.alpha=2", "seed=1", "seed=5", "data.columns.prompt=q"]
    config = make_config(tree, words)
    assert config.federation.partition.alpha == 2.0
    assert config.federation.rounds == 3
    assert config.seed == 5
    assert config.data.columns == {"prompt": "q"}
    assert tree == {"federation": {"partition": {"alpha": 1.0}, "rounds": 3}}


def test_override_values_are_yaml() -> None:
    words = ["a=", "b=[1, 2]", "c={d: 3}", "e=true", "f=x=y", "g=null", "h='1'"]
    assert apply_overrides({}, words) == {
        "a": None,
        "b": [1, 2],
        "c": {"d": 3},
        "e": True,
        "f": "x=y",
        "g": None,
        "h": "1",
    }


def test_words_that_are_no_overrides_are_all_refused_at_once() -> None:
    found = problems({}, "rounds", "=3", "seed=[1", "seed=2")
    assert len(found) == 3
    assert [line.split()[0] for line in found] == ["'rounds'", "'=3'", "seed:"]


def test_an_override_through_something_not_a_mapping_is_refused() -> None:
    problem = only_problem({"seed": 3}, "seed.more=1")
    assert problem.startswith("seed.more: ")
    assert "seed" in problem


# files


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "line 1"),
        ("a: 1\n  b: 2\n", "line 2"),
        ("- a\n- b\n", "must be a mapping, not a list"),
        ("just words", "must be a mapping, not a text"),
        (b"a: \xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_says_what_it_is(
    text: str | bytes, told: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=told) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*\n.*no such file"):
        read(tmp_path / "nowhere.yaml")


def test_a_yaml_file_cannot_make_python_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        read(write(tmp_path, "seed: !!python/object/apply:os.getpid []\n"))


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


rich = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "algorithm": st.sampled_from(["fedit", {"name": "ffa-lora", "weights": "uniform"}]),
        "adapter": st.fixed_dictionaries(
            {
                "alpha": st.floats(1e-12, 1e12),
                "targets": st.sampled_from(
                    ["auto", ["q_proj", "1e5", "0x1", "null"], "all-linear"]
                ),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "system_prompt": st.one_of(st.none(), st.text("aé:\n#'\"1e- {}", min_size=1)),
                "columns": st.dictionaries(st.text("ab", min_size=1), st.text("q r", min_size=1)),
            }
        ),
        "training": st.fixed_dictionaries(
            {
                "learning_rate": st.floats(1e-12, 1e3),
                "epsilon": st.floats(1e-30, 1.0),
                "tokens_per_pass": st.one_of(st.just("auto"), st.integers(1, 9999)),
            }
        ),
    }
)


@settings(max_examples=30)
@given(tree=rich)
def test_the_resolved_configuration_gives_the_same_run_again(
    tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config, wrong = validate(tree)
    assert wrong == []
    path = write(tmp_path_factory.getbasetemp(), dump(config))
    assert load_config(path) == config
    assert dump(load_config(path)) == dump(config)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config({}).training.batch_size = 3  # type: ignore[misc]


def test_a_broken_configuration_is_told_without_torch() -> None:
    code = (
        "import sys\n"
        "from fedllm.errors import ConfigError\n"
        "from fedllm.experiment import make_config\n"
        "try:\n    make_config({'algorithm': 'nope', 'evaluation': {'metrics': ['nope']}})\n"
        "except ConfigError as error:\n    assert len(error.problems) == 2\n"
        "make_config({'algorithm': 'flexlora', 'adapter': {'rank': [2, 4]}})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
