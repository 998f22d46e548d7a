"""Every field is checked before the first step; every message is one line."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from small import small

from configs import common, covidx_ct, cxr, demo, digits, joint, rows, siteA, siteB
from cxai_jax import data
from cxai_jax import mesh as meshes
from cxai_jax.config import check_overrides, flatten, load_config_file
from cxai_jax.training import fields, validate
from cxai_jax.training import run as runs


def with_value(field, value):
    """A config whose field has a value of any type, as a config.json may hold."""
    tree = small().to_dict()
    group, _, name = field.rpartition(".")
    (tree[group] if group else tree)[name] = value
    return ConfigDict(tree)


def refused(check, *arguments):
    """The message, one line, of a check that must fail."""
    with pytest.raises(ValueError) as error:
        check(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_field_has_a_rule():
    assert set(fields.RULES) == set(flatten(common.get_config().to_dict()))


def test_every_config_of_the_project_passes():
    for module in (demo, siteA, siteB, joint):
        for row in rows.ROWS:
            validate.check_config(module.get_config(row))
    for module in (covidx_ct, cxr):
        for row in module.ROWS:
            validate.check_config(module.get_config(row))
    for row in set(digits.ROWS) - set(digits.TARGETS):
        for target in digits.TARGETS:
            validate.check_config(digits.get_config(f"{row},{target}"))


@pytest.mark.parametrize(
    "field,words",
    [
        ("train.epoch", "is not a field; known: config.train.epochs, "),
        ("sead", "is not a field; known: config.seed, "),
        ("odd.name", "is not a field; known: "),
    ],
)
def test_a_field_that_no_rule_knows_is_refused(field, words):
    tree = small().to_dict()
    group, _, name = field.rpartition(".")
    (tree.setdefault(group, {}) if group else tree)[name] = 3
    message = refused(validate.check_config, ConfigDict(tree))
    assert message.startswith(f"config.{field} {words}")


@pytest.mark.parametrize("field", fields.RULES)
def test_another_type_is_refused_in_every_field(field):
    default = flatten(common.get_config().to_dict())[field]
    rule = fields.RULES[field]
    for wrong in (None, float("nan"), 3 if isinstance(default, str) else "three"):
        assert not rule.holds(wrong), wrong
    config = with_value(field, None)
    assert refused(validate.check_config, config).startswith(
        f"config.{field} is None; {rule.expected}"
    )


@pytest.mark.parametrize(
    "field,value,words",
    [
        ("train.epochs", "three", "is 'three'; expected a number above 0"),
        ("train.epochs", True, "is True; expected a number above 0"),
        ("augment.hflip", "yes", "is 'yes'; expected True or False"),
        ("data.site_repeats", 3, "is 3; expected a tuple of whole numbers"),
        ("data.site_repeats", (), "is (); expected a tuple of whole numbers"),
        ("data.site_repeats", (1, 0), "expected a tuple of whole numbers, 1 or more"),
        ("data.fit", "train+valid", "expected train, val, test or DATASET:SPLIT"),
        ("data.name", "phantom:x", "known: phantom, site_a"),
        ("data.phantom_mark", "often", "expected '' or a probability"),
        ("mix.name", "snapmux", "known: none, snapmix"),
        ("mix.prob", 1.5, "is 1.5; expected a number in 0..1"),
        ("mix.beta", 0.0, "expected a number above 0"),
        ("cam.mode", "explain", "is 'explain'; known: train, eval"),
        ("cpe.cam_source", "both", "is 'both'; known: mixed, clean"),
        ("cpe.num_patches", 1, "is 1; expected a whole number, 2 or more"),
        ("align.maps", ("cam", "cram"), "names among cam, gradcam_lower, input_grad"),
        ("align.distance", "l1", "known: js, symkl"),
        ("align.eta", 0.0, "expected a number between 0 and 1"),
        ("align.input_grad_fraction", 0.4, "expected 1, 1/2, 1/3"),
        ("optim.momentum", 1.0, "expected a number from 0 to below 1"),
        ("optim.milestones", (0.9, 0.4), "shares in 0..1, ascending"),
        ("optim.milestones", (0.4, 80), "shares in 0..1, ascending"),
        ("optim.groups", ("head",), "the rule 'head'; expected EXPRESSION=GROUP"),
        ("optim.groups", "head/.*=fresh", "expected a tuple of rules"),
        ("train.selection", "best", "known: last, best_val"),
        ("tta.fill", "median", "is 'median'; known: min, zero, mean"),
        ("tta.theta", 20, "is 20; expected a number in 0..1"),
        ("tta.k", -1, "is -1; expected a whole number, 0 or more"),
        ("tta.prefix_reuse", "always", "known: auto, on, off"),
    ],
)
def test_a_value_that_cannot_be_is_refused(field, value, words):
    message = refused(validate.check_config, with_value(field, value))
    assert f"config.{field}" in message and words in message


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"data.image_size": 64}, ["config.data.image_size=64", "data.resize=36"]),
        (
            {"contrastive.weight": 1.0},
            ["config.model.projection is 0: give", "weight is 1.0"],
        ),
        ({"align.weight": 1.0, "align.maps": ("cam",)}, ["config.align.maps", "two"]),
        ({"train.accumulate": 3}, ["config.train.accumulate=3", "batch_size=8"]),
        (
            {"data.fit": "train+usps:train", "data.target": "usps:train"},
            ["config.data.target both name 'usps:train'", "are not read"],
        ),
        (
            {"model.calibrator": 8},
            ["config.method=guided", "config.model.calibrator=8", "or neither"],
        ),
        (
            {"method": "calibrator"},
            ["config.method=calibrator", "config.model.calibrator=0", "set both"],
        ),
        (
            {
                "method": "calibrator",
                "model.calibrator": 8,
                "model.pretrained": "w.npz",
            },
            ["config.model.pretrained='w.npz'", "without config.model.calibrator"],
        ),
        (
            {"train.steps_per_call": 2, "data.residency": "host"},
            ["config.train.steps_per_call=2", "config.data.residency=device"],
        ),
        (
            {"align.weight": 1.0, "align.input_grad_fraction": 1 / 3},
            ["config.align.input_grad_fraction=0.33", "one image in 3"],
        ),
        ({"tta.patch": 5}, ["config.tta.patch=5", "image_size=32", "for example 4"]),
        ({"tta.patch": 8, "tta.k": 17}, ["config.tta.k=17", "16 cells"]),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, words):
    message = refused(validate.check_config, small(**changes))
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def opened():
    """(**changes) -> a run with an abstract network: nothing is compiled."""
    config = small()
    parts = {
        "workdir": None,
        "mesh": meshes.make_mesh(),
        "sources": {"": data.load(config.data)},
        "network": runs.build_network(config, 2, abstract=True),
    }
    names = {field.name for field in dataclasses.fields(runs.Run)}
    empty = dict.fromkeys(names - {"config", *parts})
    return lambda **changes: runs.Run(config=small(**changes), **parts, **empty)


def test_the_demo_runs_with_what_it_has(opened):
    run = opened()
    validate.check_run(run)
    validate.check_training(run, run.dataset.splits["train"])


@pytest.mark.parametrize(
    "changes,words",
    [
        (
            {"cpe.num_patches": 9},
            ["config.cpe.num_patches=9", "grid of tiny", "image_size=32"],
        ),
        (
            {"train.selection": "best_val", "data.fit": "train+val"},
            ["best_val", "'train+val'"],
        ),
        (
            {"optim.groups": ("stage9/.*=frozen", ".*=fresh")},
            ["'stage9/.*' matches no parameter; known:"],
        ),
        (
            {"tta.prefix_reuse": "on"},
            ["config.tta.prefix_reuse=on", "declares no prefix"],
        ),
    ],
)
def test_what_the_network_and_the_data_cannot_do_is_refused(opened, changes, words):
    message = refused(validate.check_run, opened(**changes))
    for word in words:
        assert word in message


@pytest.mark.parametrize("selecting", [{"selection": "best_val"}, {"patience": 2}])
def test_a_score_needs_every_class_on_validation(opened, selecting):
    changes = {f"train.{name}": value for name, value in selecting.items()}
    run = opened(**changes, **{"train.select_metric": "auc"})
    validate.check_run(run)
    whole = run.dataset.splits["val"]
    one = whole.subset(whole.labels == 1)
    lacking = dataclasses.replace(
        run.dataset, splits={**run.dataset.splits, "val": one}
    )
    run = dataclasses.replace(run, sources={"": lacking})
    message = refused(validate.check_run, run)
    name = run.dataset.class_names[0]
    for word in ("select_metric=auc needs every class", f"no image of {name}; "):
        assert word in message
    run.config.train.select_metric = "accuracy"
    validate.check_run(run)


def test_what_the_devices_and_the_images_cannot_do_is_refused(opened):
    run = opened(**{"align.mask_weight": 1.0})
    fit = run.dataset.splits["train"]
    validate.check_training(run, fit)
    bare = dataclasses.replace(fit, lung_masks=None)
    message = refused(validate.check_training, run, bare)
    assert "config.align.mask_weight=1.0 needs lung masks" in message


def test_a_batch_needs_two_images_of_every_site(opened):
    run = opened(**{"model.norm": "per_site"})
    fit = run.dataset.splits["train"]
    validate.check_training(run, fit)
    for alone, mean in ((0, "0.0"), (1, "1.0")):
        sites = np.zeros(16, np.int32)
        sites[: 2 * alone] = 1
        few = dataclasses.replace(fit.subset(np.arange(16)), sites=sites)
        message = refused(validate.check_training, run, few)
        assert f"has {mean} images of" in message and "site_repeats" in message
        validate.check_training(opened(), few)


@pytest.mark.parametrize(
    "argument,words",
    [
        ("train.epochs=three", "config.train.epochs is 'three'; expected a number"),
        ("train.accumulate=1.5", "is '1.5'; expected a whole number"),
        ("augment.hflip=maybe", "is 'maybe'; expected true or false"),
        ("data.site_repeats=(1,", "expected a tuple, such as"),
    ],
)
def test_an_override_of_another_type_is_refused(argument, words):
    config = common.get_config()
    assert words in refused(check_overrides, [f"--config.{argument}"], config)


def test_overrides_of_the_right_type_pass():
    given = ("train.epochs=3", "augment.hflip=false", "model.remat", "seed=7")
    tuples = ("data.site_repeats=(1,4)", "optim.groups=('head/.*=fresh','.*=frozen')")
    arguments = [f"--config.{text}" for text in (*given, *tuples)]
    check_overrides(arguments, common.get_config())


def test_a_config_file_with_another_type_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import common\n"
        "def get_config():\n"
        "    config = common.get_config()\n"
        "    config.train.epochs = 'three'\n"
        "    return config\n"
    )
    message = refused(load_config_file, str(path))
    assert "mine.py" in message and "epochs" in message
