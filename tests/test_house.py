"""House rules that a reader relies on and a machine can count."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fedllm
from fedllm.algorithms import ALGORITHMS
from fedllm.federation import BaseClient, BaseServer

SOURCE = Path(fedllm.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ALGORITHM_FILES = sorted(
    path for path in (SOURCE / "algorithms").glob("*.py") if path.name != "__init__.py"
)
AROUND_ALGORITHMS = {"catalog", "composition"}
"""Files beside the algorithms that are none, and keep to the same rules."""
PACKAGES = sorted({path.parent for path in FILES if path.name == "__init__.py"})

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
MAX_ALGORITHM_LINES = 60

# what may be reached through numpy.random and torch.random without touching a global generator
LOCAL_NUMPY = {"Generator", "default_rng", "SeedSequence", "PCG64"}
LOCAL_TORCH = {"fork_rng", "get_rng_state"}
TORCH_DRAWS = {"bernoulli", "multinomial", "normal", "rand", "randint", "randn", "randperm"}


def shown(path: Path) -> str:
    """Return a path as it is written in an import."""
    return str(path.relative_to(SOURCE))


def module_name(path: Path) -> str:
    """Return the dotted name of a package's folder."""
    return ".".join(["fedllm", *path.relative_to(SOURCE).parts])


@functools.cache
def trees() -> list[tuple[Path, ast.Module]]:
    """Return every file of the package with its syntax tree."""
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in FILES]


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for such an expression, and an empty string for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


# size


def test_files_stay_short() -> None:
    lengths = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {p: n for p, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_stay_short() -> None:
    long = {
        f"{shown(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_algorithms_fit_on_a_page() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in ALGORITHM_FILES}
    assert lengths
    assert {p: n for p, n in lengths.items() if n > MAX_ALGORITHM_LINES} == {}


def test_files_are_named_by_a_noun_of_the_field() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [shown(path) for path in FILES if path.stem in vague] == []


# algorithms


def test_algorithms_leave_arithmetic_to_the_algebra() -> None:
    spelled = [
        f"{path.name}: {word}"
        for path in ALGORITHM_FILES
        for word in ("torch.linalg", "lora_A", "lora_B", "import torch")
        if word in path.read_text()
    ]
    assert spelled == []


def test_tensor_names_are_spelled_in_one_package() -> None:
    spelled = {
        shown(path)
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (".lora_A" in node.value or ".lora_B" in node.value)
        and "\n" not in node.value  # a docstring may
    }
    assert {name.split("/")[0] for name in spelled} <= {"adapters"}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_algorithm_names_its_paper_and_its_evidence(name: str) -> None:
    doc = ALGORITHMS.load(name).__doc__ or ""
    title, *lines = doc.splitlines()
    assert title.endswith((".", ":"))
    starts = {line.split(":")[0] for line in lines if ":" in line}
    assert {"Paper", "Evidence"} <= starts


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_algorithm_is_a_server_and_a_client(name: str) -> None:
    module = ALGORITHMS.load(name)
    assert issubclass(module.Server, BaseServer)
    assert issubclass(module.Client, BaseClient)
    assert ALGORITHMS[name].summary


def test_every_algorithm_file_is_in_the_table() -> None:
    listed = {entry.target for entry in ALGORITHMS.values()}
    files = {path.stem for path in ALGORITHM_FILES}
    assert files > AROUND_ALGORITHMS
    assert listed == {f"fedllm.algorithms.{stem}" for stem in files - AROUND_ALGORITHMS}


# randomness


def imported_modules(tree: ast.Module) -> set[str]:
    """Return the names that `import` statements bind."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return {alias.asname or alias.name for node in found for alias in node.names}


def draws_globally(call: ast.Call, modules: set[str]) -> bool:
    """Tell whether a call uses a generator that the whole process shares."""
    head, _, tail = dotted(call.func).rpartition(".")
    if head in {"np.random", "numpy.random"}:
        return tail not in LOCAL_NUMPY
    if head == "random" and "random" in modules:
        return tail != "Random"
    if head == "torch.random":
        return tail not in LOCAL_TORCH
    if head in {"torch", "torch.cuda"}:
        given = {keyword.arg for keyword in call.keywords}
        return tail in {"manual_seed", "manual_seed_all", "seed"} or (
            tail in TORCH_DRAWS and "generator" not in given
        )
    return False


def test_no_global_generator_is_used() -> None:
    found = [
        f"{shown(path)}:{node.lineno} {dotted(node.func)}"
        for path, tree in trees()
        for modules in [imported_modules(tree)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and draws_globally(node, modules)
    ]
    assert found == []


def test_only_generators_are_imported_out_of_a_random_module() -> None:
    # a function imported by its name would escape the check above
    allowed = {"random": {"Random"}, "numpy.random": LOCAL_NUMPY, "torch.random": LOCAL_TORCH}
    found = [
        f"{shown(path)}:{node.lineno} {alias.name}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name not in allowed.get(node.module or "", {alias.name})
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_global"),
    [
        ("np.random.seed(0)", True),
        ("np.random.rand(3)", True),
        ("np.random.default_rng(0)", False),
        ("random.seed(0)", True),
        ("random.Random(0)", False),
        ("torch.manual_seed(0)", True),
        ("torch.Generator().manual_seed(0)", False),
        ("torch.randn(3)", True),
        ("torch.randn(3, generator=g)", False),
        ("generator.random()", False),
    ],
)
def test_the_check_for_global_generators_tells_them_apart(line: str, is_global: bool) -> None:
    tree = ast.parse(line)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert any(draws_globally(call, {"random"}) for call in calls) == is_global


# what importing does


@pytest.mark.parametrize(
    "module",
    ["cli", "algorithms", "config", "system", "registry", "seeding", "errors", "simulation.events"],
)
def test_importing_does_not_import_torch(module: str) -> None:
    name = f"fedllm.{module}"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} does not exist yet")
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"{name} imports torch"


def test_checking_the_settings_of_every_algorithm_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from fedllm.algorithms import ALGORITHMS, problems\n"
        "assert not any(problems(name, {}) for name in ALGORITHMS)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "an algorithm's file imports torch"


@pytest.mark.slow
def test_every_module_can_be_imported() -> None:
    found = pkgutil.walk_packages([str(SOURCE)], "fedllm.")
    names = [info.name for info in found if not info.name.endswith("__main__")]
    assert len(names) > 20
    for name in names:
        importlib.import_module(name)


# exports


@pytest.mark.parametrize("package", PACKAGES, ids=module_name)
def test_every_exported_name_exists_and_is_listed_once(package: Path) -> None:
    module = importlib.import_module(module_name(package))
    exported = list(getattr(module, "__all__", []))
    assert len(exported) == len(set(exported))
    assert [name for name in exported if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", PACKAGES, ids=module_name)
def test_what_a_package_takes_from_its_own_files_it_exports(package: Path) -> None:
    own = module_name(package)
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    taken = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(own)
        for alias in node.names
    }
    module = importlib.import_module(own)
    names = {name for name in taken if not isinstance(getattr(module, name), ModuleType)}
    assert names <= set(getattr(module, "__all__", []))


def test_every_file_says_first_what_it_holds() -> None:
    silent = [shown(path) for path, tree in trees() if not (ast.get_docstring(tree) or "").strip()]
    assert silent == []


def test_only_the_command_line_prints() -> None:
    printing = {
        shown(path)
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) == "print"
    }
    assert {name for name in printing if not name.startswith("cli")} == set()
