"""Imports only go down the floors of the house, and never in a circle."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import REPO

import cxai_jax

PACKAGE = REPO / "cxai_jax"
# From the ground up; folders of one floor do not import each other.
FLOORS = [
    {
        "config",
        "types",
        "mesh",
        "host",
        "hosts",
        "disk",
        "writer",
        "signals",
        "progress",
    },
    {"maps", "models"},
    {"objectives", "data"},
    {"voting"},
    {"methods"},
    {"scoring"},
    {"report"},
    {"training"},
    {"inference"},
    {"train", "predict", "commands"},
    {"main"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, path


MODULES = dict(modules())


def imported(path):
    """Modules of the package that a file imports, by their longest known name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            target = name.removeprefix("cxai_jax.")
            while name.startswith("cxai_jax.") and target and target not in MODULES:
                target = target.rpartition(".")[0]
            if name.startswith("cxai_jax.") and target:
                yield target


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    room = name.partition(".")[0]
    assert room in FLOOR, f"{room} has no floor yet: add it to FLOORS"
    for target in imported(MODULES[name]):
        below = target.partition(".")[0]
        if below == room:
            continue
        assert FLOOR[below] < FLOOR[room] or (
            FLOOR[below] == FLOOR[room] == 0  # The root's files know each other.
        ), f"{name} imports {target}"


def test_no_imports_in_a_circle():
    graph = {name: set(imported(path)) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.


def test_the_table_of_folders_is_current():
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in set(FLOOR) - FLOORS[0] - FLOORS[-2] - FLOORS[-1]:
        used = {
            target.partition(".")[0]
            for name, path in MODULES.items()
            if name.partition(".")[0] == room
            for target in imported(path)
        }
        row = next(r for r in text.splitlines() if r.startswith(f"| `{room}/`"))
        told = {part.strip() for part in row.split("|")[3].split(",")} - {""}
        assert used - FLOORS[0] - {room} == told, row


def test_every_floor_entry_exists():
    assert set(FLOOR) == {name.partition(".")[0] for name in MODULES}


def test_every_folder_says_what_lives_there():
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), name


def test_a_long_file_says_why():
    for name, path in MODULES.items():
        text = path.read_text()
        if len(text.splitlines()) > 400:
            assert "longer" in (ast.get_docstring(ast.parse(text)) or "").lower(), name


def test_a_step_is_read_one_function_at_a_time():
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_tensorflow_is_never_imported():
    for path in MODULES.values():
        assert "import tensorflow\n" not in path.read_text(), path


def test_public_functions_are_there_and_cost_nothing_to_import():
    for name in cxai_jax.__all__:
        assert callable(getattr(cxai_jax, name)), name
    with pytest.raises(AttributeError, match="no attribute 'cams'"):
        cxai_jax.cams  # noqa: B018
    program = "import sys, cxai_jax; print('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
