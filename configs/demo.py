"""The whole method on NumPy-made phantoms: no download, no GPU.

python -m cxai_jax.main --config=configs/demo.py
"""

from configs import common, rows


def get_config(words: str = "full"):
    config = common.get_config()
    config.model.name = "tiny"
    config.data.name = "phantom"
    config.data.image_size = 64
    config.data.resize = 72
    config.mix.prob = 0.5  # SnapMix's own choice when training from scratch.
    config.optim.lr_fresh = 0.05
    config.optim.schedule = "cosine"
    config.train.batch_size = 32
    config.train.epochs = 40.0
    config.train.checkpoint_every_epochs = 10.0
    config.tta.k = 31
    config.tta.patch = 2  # 31 cells are 3 % of 64 px, about the paper's 4 % of 224.
    return rows.apply_rows(config, words)
