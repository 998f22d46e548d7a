"""Table 3: every row is a config that may run, and each class is rated."""

import numpy as np
import pytest
from test_compare import predictions, results
from test_paper_tables import Options

from cxai_jax import models
from cxai_jax.training import validate
from experiments import compare, table3, tables

FEW = ["--size=56", "--epochs=5", "--seeds=0", "--recipe=short", "--backbone=lite0"]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("recipe", tables.RECIPES)
def test_every_row_is_a_config_that_may_run(classes, recipe):
    table = table3.table(classes)
    jobs = tables.plan(table, table.rows, Options(recipe=recipe, backbone="lite0"))
    assert [job.system for job in jobs] == [row.name for row in table3.ROWS]
    for job in jobs:
        validate.check_config(job.config)
        models.build(job.config.model, classes, num_sites=1)
        binary = job.config.data.name == "covidx_ct_binary"
        assert binary == (classes == 2) and job.config.data.fit == "train"
    found = {job.system: job.config for job in jobs}
    assert [found[row.name].model.name for row in table3.ROWS[:5]] == [
        "resnet50",
        "nasnet_mobile",
        "efficientnet_b0",
        "covidnet_ct",
        "efficientnet_lite0",
    ]
    assert found["Baseline + CPE"].mix.name == "none"
    assert found["SnapMix"].cpe.weight == 0 and found["SnapMix + CPE"].cpe.weight == 1
    assert found["SnapMix + Contrastive"].contrastive.weight == 1
    assert found["Ours (Full)"].tta.k == 31
    size = {"published": 8, "ours": 64, "short": 16}[recipe]
    assert found["COVIDNet-CT"].train.batch_size == size


def test_every_row_is_listed(capsys):
    table3.main(["--list"])
    text = capsys.readouterr().out
    for row in table3.ROWS:
        assert f"  {row.name} ({row.key}): 0 of 5; {row.figures}: " in text
    assert "(snapmix): 0 of 5; Ali et al. 2022: see the paper" in text
    assert "sensitivity Non-Covid-19 99.0, PPV Non-Covid-19 98.4, PPV COVID" in text
    with pytest.raises(SystemExit, match="no row 'sepnorm'; known: resnet_50, nasnet"):
        table3.main(["--classes=2", "--rows=sepnorm"])


def kept(folder, job, names):
    """Writes the file of a run with random predictions of some classes."""
    given, random = predictions(60), np.random.default_rng(1)
    given["labels"] = np.arange(60) % len(names)
    given["probs"] = random.dirichlet(np.ones(len(names)), 60)
    given["chosen"] = given["probs"].argmax(1)
    given["voted"] = random.integers(0, len(names), 60)
    found = results()
    found["data"] |= {"name": job.config.data.name, "site_names": ["covidx_ct"]}
    found["data"] |= {"class_names": list(names), "positive": "COVID-19"}
    compare.keep(folder / f"{job.name}.json", job, found, given)
    return given


@pytest.mark.parametrize(
    "classes,names",
    [(3, ("Normal", "Pneumonia", "COVID-19")), (2, ("Normal", "COVID-19"))],
)
def test_each_class_is_rated(classes, names, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "run_all", lambda *a, **k: None)
    options = Options(recipe="short", size=56, epochs=5.0, backbone="lite0")
    table = table3.table(classes)
    (job,) = tables.plan(table, tables.chosen(table, "baseline"), options)
    given = kept(tmp_path / "tables", job, names)
    table3.main([f"--classes={classes}", "--rows=baseline,covidnet_ct", *FEW])
    lines = (tmp_path / f"{table.name}.md").read_text().splitlines()
    head, _, baseline, covidnet = lines[4:8]
    cells = dict(zip(head.split(" | "), baseline.split(" | "), strict=True))
    labels = given["labels"]
    for chosen, end in ((given["chosen"], ""), (given["voted"], " after voting")):
        hits = [np.sum((labels == c) & (chosen == c)) for c in range(classes)]
        recall = [n / np.sum(labels == c) for c, n in enumerate(hits)]
        precision = [n / np.sum(chosen == c) for c, n in enumerate(hits)]
        for kind, values in (("sensitivity", recall), ("PPV", precision)):
            for name, value in (
                *zip(names, values, strict=True),
                ("", np.mean(values)),
            ):
                column = f"{kind} {name}" if name else f"macro {kind}"
                assert cells[column + end].startswith(f"{100 * value:.1f} ("), column
    assert "not run here" in covidnet and "accuracy 99.1" in covidnet
