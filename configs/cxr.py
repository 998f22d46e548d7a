"""Chest X-rays, COVID-19 against other findings, with saliency alignment.

python tools/prepare_data.py --dataset=cxr --source=DIR --data_dir=data
python -m cxai_jax.main --config=configs/cxr.py:cheap,lite0

Rows: baseline (cross-entropy alone), linear_probe (and of the head alone), cheap (CAM
and Grad-CAM agree), full (and the input gradient), mask (cheap, and their energy in the
lungs); weighted and selected against imbalance. The alignment loss is a reconstruction
of Purwita & Qomariyah (2021), whose network and data are not public.
"""

from configs import common, rows


def get_config(words: str = "cheap,lite0"):
    config = common.get_config()
    config.data.name = "cxr"
    config.data.split = "seed0"  # Patient-disjoint; seed1, seed2, ... are others.
    config.data.fit = "train+val"
    config.augment.vflip = False  # A chest has its diaphragm below.
    config.mix.name = "none"
    config.cpe.weight = 0.0
    config.optim.lr_trunk = 0.005
    config.optim.lr_fresh = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.1
    config.optim.clip_norm = 1.0  # The loss is steep where a map is nearly flat.
    config.train.batch_size = 16
    config.train.epochs = 30.0
    return rows.apply_rows(config, words, ROWS)


def cheap(config):
    config.align.weight = 1.0
    config.align.maps = ("cam", "gradcam_lower")


def full(config):
    config.align.weight = 1.0
    config.align.maps = ("cam", "gradcam_lower", "input_gradient")


def mask(config):
    """Beyond the paper: needs lung masks, which part of the images have."""
    cheap(config)
    config.align.mask_weight = 0.3
    # On a 7 x 7 grid one cell more would declare 79 % of a chest X-ray lung, with the
    # corners where letters are burnt in, instead of 30 %.
    config.align.mask_dilate = 0


def weighted(config):
    """Cross-entropy by true class: the rarer one counts as much as the other."""
    config.train.class_weights = "auto"


def selected(config):
    """The epoch of the best balanced accuracy on validation."""
    config.data.fit = "train"
    config.train.eval_every_epochs = 1.0
    config.train.selection = "best_val"
    config.train.select_metric = "balanced_accuracy"


ROWS = {
    "baseline": rows.baseline,
    "cheap": cheap,
    "full": full,
    "mask": mask,
    "weighted": weighted,
    "selected": selected,
    "linear_probe": rows.linear_probe,
    "lite0": rows.lite0,
}
