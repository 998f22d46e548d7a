"""The Colab notebook: no outputs, short cells, and it runs from top to bottom."""

import json
import sys
import types

import matplotlib
import pytest
from conftest import REPO

NOTEBOOK = REPO / "experiments" / "colab_tpu.ipynb"
LONGEST = 25  # Lines of a cell.


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text())["cells"]


def sources(cells):
    """The code cells as Python: shell and magic lines stripped."""
    for cell in cells:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            yield "\n".join(line for line in lines if not line.startswith(("%", "!")))


def test_cells_are_short_and_outputs_are_stripped(cells):
    for cell in cells:
        assert len(cell["source"]) <= LONGEST, cell["source"][0]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_nothing_upgrades_jax(cells):
    shell = [
        line
        for cell in cells
        for line in cell["source"]
        if line.startswith(("%", "!")) and "install" in line
    ]
    assert shell
    assert [line for line in shell if "{ROOT}[data,pretrained,dicom]" in line]
    for line in shell:
        assert not {"-U", "--upgrade", "jax", "jaxlib", "libtpu"} & set(line.split())


def test_uploads_come_first_and_long_output_is_folded(cells):
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    asking = [number for number, text in enumerate(code) if "files.upload" in text]
    assert asking == [1]  # Behind the settings: nobody has to come back for it.
    assert code[0].count("@param") == 6
    for cell in cells:
        text = "".join(cell["source"])
        long = "pip install" in text or "loop.train(" in text
        assert cell["metadata"].get("collapsed", False) == long, text


def test_an_upload_is_asked_for_and_found_from_anywhere(cells, monkeypatch):
    given = iter(["chests.zip", "one.dcm"])
    files = types.SimpleNamespace(upload=lambda: {next(given): b""})
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    code = list(sources(cells))
    settings = (
        code[0].replace('"phantom"', '"zip"').replace('IMAGE = ""', 'IMAGE = "upload"')
    )
    names = {}
    exec(settings, names)
    exec(code[1], names)
    assert (names["ZIP"].name, names["IMAGE"].name) == ("chests.zip", "one.dcm")
    assert names["ZIP"].is_absolute() and names["IMAGE"].is_absolute()


def test_every_code_cell_is_python(cells):
    for number, source in enumerate(sources(cells)):
        compile(source, f"cell {number}", "exec")


@pytest.fixture
def quick(monkeypatch):
    """A small, throw-away run in a folder of the checkout's own layout."""
    monkeypatch.setenv("CXAI_QUICK", "1")
    monkeypatch.chdir(REPO / "experiments")
    monkeypatch.setattr(sys, "path", list(sys.path))
    matplotlib.use("Agg")
    return {"__name__": "__main__"}


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs(cells, quick, tmp_path, capsys):
    for number, source in enumerate(sources(cells)):
        source = source.replace('Path("runs/notebook")', f"Path({str(tmp_path)!r})")
        exec(compile(source, f"cell {number}", "exec"), quick)
    assert quick["WORKDIR"] == tmp_path
    # The shell lines are left out here: what they install must be there to install.
    assert (quick["ROOT"] / "pyproject.toml").is_file()
    assert quick["results"]["data"]["name"] == "phantom"
    assert (tmp_path / "reports.zip").stat().st_size > 10_000
    assert "label_before" in (tmp_path / "prediction/predictions.csv").read_text()
    printed = capsys.readouterr().out.splitlines()
    losses = [json.loads(line) for line in printed if line.startswith("[")]
    linen, nnx = losses[-2:]
    assert linen[-1] < linen[0] and nnx[-1] < nnx[0]
