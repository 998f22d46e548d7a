"""COVIDx-CT on its published split, ResNet-50: Table 3 of the CT paper.

python tools/prepare_data.py --dataset=covidx_ct --source=DIR --data_dir=data
python -m cxai_jax.main --config=configs/covidx_ct.py:full
python -m cxai_jax.main --config=configs/covidx_ct.py:full,binary

Three classes, as the published code has; `binary` leaves pneumonia out, as the counts
of the paper do (A25). `--config.data.split=CT-2A-body` takes the slices that were
prepared cropped to the body, which the paper does not say it did.
"""

from configs import common, rows


def get_config(words: str = "full"):
    config = common.get_config()
    config.data.name = "covidx_ct"
    config.data.split = "CT-2A"  # Never compared with figures on CT-1 (A25).
    config.data.fit = "train"  # The paper's counts; validation calibrates.
    return rows.apply_rows(config, words, ROWS)


def binary(config):
    """COVID-19 against normal slices, without pneumonia."""
    config.data.name = "covidx_ct_binary"


def gunraj(config):
    """The recipe of COVIDNet-CT (Gunraj et al. 2020), at this input size.

    Their sampler draws the classes in equal parts; here the loss weighs them so. Their
    shear and the jitter of the body box have no counterpart.
    """
    rows.baseline(config)
    config.augment.crop = "none"
    config.augment.vflip = False
    config.augment.rotate = 15.0
    config.augment.intensity = 0.1
    config.optim.lr_trunk = config.optim.lr_fresh = 1e-3
    config.optim.schedule = "constant"
    config.train.batch_size = 8
    config.train.epochs = 20.0
    config.train.class_weights = "auto"


ROWS = rows.ROWS | {"binary": binary, "gunraj": gunraj}
