"""The documentation says what the code does: fields, tables, commands and links."""

import copy
import importlib
import json
import re

import pytest
from conftest import REPO

from configs import common
from cxai_jax.config import flatten
from experiments import collect_result, results_table, speed_table
from tools import document_config

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES += ("experiments/README.md",)


def text(name):
    return (REPO / name).read_text(encoding="utf-8")


def test_every_config_field_is_explained_and_the_page_is_current():
    source = document_config.SOURCE.read_text()
    fields = flatten(common.get_config().to_dict())
    assert document_config.explanations(source).keys() == fields.keys()
    assert document_config.TARGET.read_text() == document_config.document(source), (
        "run python -m tools.document_config"
    )


def test_a_field_without_a_comment_is_named():
    source = re.sub(r"  # Seeds.*", "", document_config.SOURCE.read_text())
    with pytest.raises(ValueError, match="says nothing of seed"):
        document_config.document(source)


@pytest.mark.parametrize(
    "line",
    [
        "    config.a.b = 1  # One.",
        "    # One.\n    config.a.b = 1",
    ],
)
def test_a_comment_is_beside_or_above(line):
    source = (
        "def get_config():\n    config = C()\n    config.a = a = C()\n"
        + line.replace("config.a.b", "a.b")
    )
    assert document_config.explanations(source) == {"a.b": "One."}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    folder = (REPO / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text(page)):
        if not target.startswith("http"):
            assert (folder / target).exists(), f"{page} links to {target}"
    named = re.findall(
        r"(?:configs|tools|experiments|cxai_jax|tests)/\w+\.py", text(page)
    )
    for name in named:
        assert (REPO / name).exists(), f"{page} names {name}"
    for module in re.findall(
        r"python -m ((?:tools|experiments|cxai_jax)\.\w+)", text(page)
    ):
        assert (REPO / (module.replace(".", "/") + ".py")).exists(), module


@pytest.mark.parametrize("page", PAGES)
def test_fields_and_rows_that_are_named_exist(page):
    fields = flatten(common.get_config().to_dict())
    for field in re.findall(r"--config\.([\w.]+)=", text(page)):
        assert field in fields, f"{page} sets {field}"
    for name, rows in re.findall(r"--config=configs/(\w+)\.py:([\w,]+)", text(page)):
        importlib.import_module(f"configs.{name}").get_config(
            rows
        )  # Raises if unknown.


def test_the_two_commands_come_first():
    commands = [
        line for line in text("README.md").splitlines() if "pip install" in line
    ]
    assert commands[0] == (
        "pip install -c constraints.txt -e . && python -m cxai_jax.main "
        "--config=configs/demo.py"
    )
    assert commands[1] == "pip install -c constraints.txt -e '.[test]' && pytest"


def test_every_decision_has_a_row():
    rows = re.findall(r"^\| (A\d+) \|", text("experiments/README.md"), re.M)
    assert rows == [f"A{i}" for i in range(1, 33)]


def test_the_readme_has_the_current_results():
    page, table = text("README.md"), results_table.table(results_table.RESULTS)
    assert page == results_table.renewed(page, table), (
        "run python -m experiments.results_table"
    )
    with pytest.raises(ValueError, match="must have one line"):
        results_table.renewed("no markers", "")


def test_the_readme_has_the_current_verdicts(tmp_path):
    page, table = text("README.md"), results_table.claims(results_table.RESULTS)
    assert page == results_table.renewed(page, table, results_table.CLAIMS), (
        "run python -m experiments.results_table"
    )
    gain = {"mean": -0.01, "sd": None, "low": -0.02, "high": 0.0, "detectable": 0.013}
    judged = {"verdict": "refuted: ...", "difference": gain, "predictions": 1492}
    folder = tmp_path / "does_it_work"
    folder.mkdir()
    claims = json.dumps({"claims": {"CPE helps": judged}})
    (folder / "cpu_site_a_verdicts.json").write_text(claims)
    assert results_table.claims(tmp_path).splitlines()[2:] == [
        "| CPE helps | - | refuted: -1.0 (-2.0 to +0.0) [1.3], N = 1,492 |"
    ]


def test_the_readme_has_the_current_ratios_to_pytorch(tmp_path):
    page, table = text("README.md"), speed_table.table(speed_table.RESULTS)
    assert page == results_table.renewed(page, table, speed_table.BEGIN), (
        "run python -m experiments.speed_table"
    )
    assert speed_table.table(tmp_path).splitlines()[-1].endswith(" | -" * 7 + " |")
    ratio = {"torch": {"median": 1.5, "min": 1.25, "max": 2}}
    row = {"ratios": ratio, "noisy": True, "wrong": "loss 1, but torch 2"}
    assert speed_table.cell(row, "torch") == "1.50 (1.25-2.00) noisy unequal"


def test_the_picture_is_small():
    picture = REPO / "experiments" / "results" / "readme.png"
    assert 10_000 < picture.stat().st_size < 200_000


RUN = {
    "metrics": {
        "all": {
            "accuracy": 0.913,
            "f1": 0.9,
            "auc": 0.95,
            "number": 203,
            "intervals": {
                "accuracy": [0.88, 0.941],
                "f1": [0.8, 0.95],
                "auc": [0.9, 0.98],
            },
        },
        "voted": {"accuracy": 0.92, "intervals": {"accuracy": [0.89, 0.95]}},
        "flips": [{"name": "7.png"}, {"name": "8.png"}],
    },
    "explanations": {},
    "calibration": {},
    "selected": {"rule": "last"},
    "curve": [{"step": 1}],
    "steps": 5,
    "time": {"total_s": 61.4},
    "data": {
        "name": "site_b",
        "split_scheme": "official",
        "leakage": {"verdict": "clean", "pairs": {"train-test": {}}},
    },
    "versions": {"cxai-jax": "0.1.0", "jax": "0.10.2"},
    "device": {"kind": "cpu", "count": 1, "hosts": 1},
    "pretrained": {"source": "/home/me/w.npz"},
}


def make_run(folder):
    config = common.get_config()
    config.data.data_dir = "/home/me/data"
    config.model.pretrained = "/home/me/w.npz"
    run = {**copy.deepcopy(RUN), "config": json.loads(config.to_json())}
    (folder / "results.json").write_text(json.dumps(run))


def test_a_run_is_collected_without_places_and_tabulated(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_result, "RESULTS", tmp_path)
    make_run(tmp_path)
    collect_result.main([str(tmp_path), "site_b_full"])
    kept = (tmp_path / "site_b_full.json").read_text()
    assert "/home/me" not in kept and "7.png" not in kept and "curve" not in kept
    (tmp_path / "results.json").unlink()
    (tmp_path / "other.json").write_text('{"rows": []}')
    table = results_table.table(tmp_path).splitlines()
    assert len(table) == 3
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[0] == "[site_b](experiments/results/site_b_full.json), official"
    assert cells[1] == "cross-entropy + snapmix + CPE"
    assert cells[2:5] == ["resnet50, w.npz", "203", "91.3 (88.0-94.1)"]
    assert cells[7] == "92.0 (89.0-95.0), 2 flipped"
    assert cells[8:] == ["clean", "0, cpu, cxai-jax 0.1.0, jax 0.10.2"]


def test_without_runs_the_table_says_so(tmp_path):
    assert "No run" in results_table.table(tmp_path)


def test_collecting_an_unfinished_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        collect_result.main([str(tmp_path), "x"])
    assert "no finished run" in capsys.readouterr().err
