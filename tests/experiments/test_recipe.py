"""The recipe's runs: what each factor changes, and that test images are left alone."""

import pytest

from cxai_jax.config import flatten
from cxai_jax.training import validate
from experiments import recipe


def plan(**changes):
    options = {"data_dir": "data", "size": 96, "seeds": [0], "folds": None}
    return recipe.plan(list(recipe.FACTORS), **options | changes)


@pytest.mark.parametrize("folds", [None, 5])
def test_no_run_sees_a_test_image(folds):
    for job in plan(folds=folds):
        validate.check_config(job.config)
        assert (job.config.data.fit, job.config.data.test) == ("train", "val")
        assert bool(job.fold) == bool(folds)


@pytest.mark.parametrize("start", [recipe.START, "baseline,lite0,short"])
def test_a_factor_changes_its_own_fields_alone(start):
    reference, *others = plan(start=start)
    assert reference.system == "recipe"
    usual = flatten(reference.config.to_dict())
    for job in others:
        found = flatten(job.config.to_dict())
        changed = {name for name in usual if found[name] != usual[name]}
        named = {field.split("=")[0] for field in recipe.FACTORS[job.system]}
        if job.system == "larger images":
            named = {"data.image_size", "data.resize", "tta.patch"}
        assert changed and changed <= named, job.system


def test_an_unknown_factor_is_one_line():
    with pytest.raises(ValueError, match="'lr x 4' is unknown; known: recipe, lr / 3"):
        recipe.plan(["lr x 4"], data_dir="data", size=96, seeds=[0], folds=None)
