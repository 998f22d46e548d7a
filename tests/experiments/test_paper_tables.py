"""Tables 1 and 2 and the cross-site matrix: what is planned, listed and written."""

import numpy as np
import pytest
from test_compare import predictions, results

from cxai_jax import models
from cxai_jax.training import validate
from experiments import compare, cross_site, tables

FEW = ["--size=56", "--epochs=5", "--seeds=0", "--recipe=short", "--backbone=lite0"]


class Options:
    """What argparse gives; attributes by keyword."""

    def __init__(self, **given):
        usual = {"seeds": "0", "folds": None, "recipe": "published", "set": []}
        usual |= {"epochs": None, "size": None, "backbone": None, "train_on": "table"}
        usual |= {"own_size": None, "joint_epochs": None}
        self.__dict__.update(usual | given)


@pytest.mark.parametrize("recipe", tables.RECIPES)
@pytest.mark.parametrize("backbone", [None, "lite0", "resnet18"])
def test_every_row_is_a_config_that_may_run(recipe, backbone):
    options = Options(recipe=recipe, backbone=backbone, size=112)
    jobs = tables.plan(tables.TABLE2, tables.ROWS, options)
    assert [job.system for job in jobs] == [row.name for row in tables.ROWS]
    for job in jobs:
        validate.check_config(job.config)
        models.build(job.config.model, 2, num_sites=2)
    found = {job.system: job.config for job in jobs}
    assert found["COVID-Net (single)"].data.name == "site_b"
    assert found["COVID-Net (joint)"].data.name == "joint"
    assert found["SepNorm"].model.name == "covidnet_redesign"
    assert found["SepNorm"].model.norm == "per_site"
    assert found["Redesign (joint)"].model.norm == "plain"
    assert found["Series Adapter"].model.name.startswith("resnet")
    assert found["MS-Net"].method == "ms_net"
    assert found["SepNorm + Contrastive"].contrastive.weight == 1
    assert found["Ours (Full)"].tta.k == 31 and found["SnapMix + CPE"].tta.k == 0
    wang = found["SepNorm"]
    if recipe == "published":
        assert (wang.optim.name, wang.optim.lr_fresh) == ("adam", 1e-4)
        assert (wang.loss.scores, wang.train.batch_size) == ("sigmoid", 32)
    else:
        assert (wang.optim.name, wang.loss.scores) == ("sgd", "logits")


def test_rows_that_need_both_sites_have_them_and_own_networks_a_size_of_their_own():
    options = Options(recipe="short", size=112, own_size=56, train_on="site")
    options.epochs, options.joint_epochs = 5.0, 1.5
    jobs = tables.plan(tables.TABLE2, tables.ROWS, options)
    found = {job.system: job.config for job in jobs}
    joint = {name for name, config in found.items() if config.data.name == "joint"}
    assert joint == {
        "COVID-Net (joint)",
        "Redesign (joint)",
        "SepNorm",
        "SepNorm + Contrastive",
    }
    small = {name for name, config in found.items() if config.data.image_size == 56}
    assert small == joint | {"COVID-Net (single)", "Redesign (single)"}
    longer = {name for name, config in found.items() if config.train.epochs == 5}
    assert longer == set(found) - joint and found["SepNorm"].train.epochs == 1.5
    assert found["SepNorm"].tta.patch == 2 and found["MS-Net"].data.image_size == 112


def test_every_row_of_the_papers_is_listed_and_an_unknown_one_refused(capsys):
    tables.main(tables.TABLE1, ["--list"])
    text = capsys.readouterr().out
    for row in tables.ROWS:
        assert f"  {row.name} ({row.key}): 0 of 5; {row.figures}" in text
    assert "Ours (Full) (ours_full): 0 of 5; Ali et al. 2022: f1 95.87" in text
    with pytest.raises(SystemExit, match="no row 'sep'; known: series_adapter, paral"):
        tables.main(tables.TABLE1, ["--rows=sep"])


def kept(folder, job, names, sites, site_names, seed=0):
    """Writes the file of a run with random predictions."""
    given = predictions(len(names)) | {"names": np.array(names), "sites": sites}
    given["probs"] = np.random.default_rng(seed).dirichlet((1, 1), len(names))
    given["chosen"] = given["probs"].argmax(1)
    found = results()
    found["data"] |= {"name": job.config.data.name, "site_names": site_names}
    compare.keep(folder / f"{job.name}.json", job, found, given)
    return given


def test_a_table_scores_its_own_site_and_says_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "run_all", lambda *a, **k: None)
    b = [f"CT_COVID/{i}.png" for i in range(20)]
    both = [f"COVID/{i}.png" for i in range(30)] + b
    sites = np.repeat([0, 1], [30, 20])
    options = Options(recipe="short", size=56, epochs=5.0, backbone="lite0")
    rows = tables.chosen(tables.TABLE2, "sepnorm,baseline,covid_net_single")
    jobs = tables.plan(tables.TABLE2, rows, options)
    for seed, job in enumerate(jobs[:2]):
        given = kept(tmp_path / "tables", job, both, sites, ["site_a", "site_b"], seed)
    rows_of = ",".join(row.key for row in rows)
    tables.main(tables.TABLE2, [f"--rows={rows_of}", *FEW])
    page = (tmp_path / "table2.md").read_text()
    head, _, sepnorm, baseline, covidnet = page.splitlines()[4:9]
    assert head.split(" | ")[-1] == "best test epoch (optimistic) |"
    right = np.mean((given["chosen"] == given["labels"])[30:])
    assert baseline.startswith(f"| Baseline | {100 * right:.1f} (")
    assert "covidnet_redesign, no pretrained weights, 56 px, 5 epochs" in sepnorm
    assert (
        "efficientnet_lite0, lite0-imagenet" in baseline and "0.90 to 0.30" in baseline
    )
    assert "f1" not in sepnorm and "see the paper (Wang et al. 2020b)" in sepnorm
    assert "not run here" in covidnet and covidnet.count("| - ") >= 9
    assert "Difference to Baseline" in page and "SepNorm" in page.split("Difference")[1]
    latex = (tmp_path / "table2.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") > 1
    alone = {"site_names": ["site_b"], "sites": np.zeros(2)}
    with pytest.raises(ValueError, match="tested on site_b, not on site_a"):
        tables.of_site(alone, "site_a")


def test_the_cross_site_matrix(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "run_all", lambda *a, **k: None)
    a = [f"non-COVID/{i}.png" for i in range(30)]
    b = [f"CT_NonCOVID/{i}.png" for i in range(20)]
    options = Options(rows="baseline,sepnorm", recipe="short", size=56, epochs=5.0)
    options.backbone = "lite0"
    jobs = cross_site.plan(options)
    assert [job.system for job in jobs[3:]] == [
        f"sepnorm on {site}" for site in ("site_a", "site_b", "both")
    ]
    assert [job.config.model.norm for job in jobs[3:]] == ["plain", "plain", "per_site"]
    assert jobs[0].config.data.test == "test+site_b:test"
    truth = {}
    for seed, job in enumerate(jobs):
        validate.check_config(job.config)
        names = b + a if job.config.data.name == "site_b" else a + b
        sites = np.zeros(50, int)
        given = kept(tmp_path / "cross_site", job, names, sites, ["x"], seed)
        right = given["chosen"] == given["labels"]
        of_b = np.array([name in b for name in names])
        truth[job.system] = right[~of_b].mean(), right[of_b].mean()
    cross_site.main(["--rows=baseline,sepnorm", *FEW])
    text = capsys.readouterr().out
    for system, (on_a, on_b) in truth.items():
        line = next(r for r in text.splitlines() if r.startswith(f"| {system} |"))
        first, second = line.split(" | ")[1:3]
        assert first.startswith(f"{100 * on_a:.1f} (")
        assert second.startswith(f"{100 * on_b:.1f} (")
    assert (tmp_path / "cross_site.png").stat().st_size > 5_000
    assert "tested on site_a" in (tmp_path / "cross_site.tex").read_text().replace(
        r"\_", "_"
    )
    with pytest.raises(
        SystemExit, match="no row 'sep'; known: baseline, snapmix, full"
    ):
        cross_site.main(["--rows=sep"])
