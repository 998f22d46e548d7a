"""Imports only go down the floors of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cxai_jax"

# Modules of one floor do not import each other, except where a line says so.
FLOORS = [
    {"types"},
    {"grid", "metrics", "optimizer", "mesh", "checkpoint", "writer", "augment"}
    | {"roofline", "host_memory", "reuse", "executables", "data.reading"},
    {"cam", "losses", "alignment", "tta", "explanation_metrics", "config"}
    | {"calibration", "figures", "models.lowering", "data.transforms"}
    | {"data.splits", "data.leakage", "data.records", "data.tables"},
    {"mixing", "saliency", "models.norm", "models.pretrained", "data.store"}
    | {"novelty", "page"},
    {
        "models.backbone",
        "data.inputs",
        "data.phantom",
        "data.sites",
        "data.folder",
        "data.cxr",
    },
    {"models.tiny", "models.resnet", "models.efficientnet_lite0"},
    {"models", "data"},
    {"data.pipeline", "voting"},
    {"steps", "preview"},
    {"evaluate"},
    {"explain"},
    {"report", "setup"},
    {"compilation", "outcome"},
    {"train"},
    {"trained", "check"},
    {"prediction_table"},
    {"main", "predict"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("cxai_jax."):
                yield name.removeprefix("cxai_jax.")


@pytest.mark.parametrize("name,path", list(modules()), ids=lambda v: str(v))
def test_imports_go_down(name, path):
    assert name in FLOOR, f"{name} has no floor yet: add it to FLOORS"
    for target in imported(path):
        while target and target not in FLOOR:
            target = target.rpartition(".")[0]
        if target and target != name:
            assert FLOOR[target] < FLOOR[name], f"{name} imports {target}"


def test_every_floor_entry_exists():
    assert set(FLOOR) == {name for name, _ in modules()}


def test_tensorflow_is_never_imported():
    for _, path in modules():
        assert "import tensorflow\n" not in path.read_text(), path
