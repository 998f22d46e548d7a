"""A run of some seconds whose every step is saved: there is much to interrupt."""

from configs import demo


def get_config(words: str = ""):
    config = demo.get_config("full")
    config.data.image_size = 32
    config.data.resize = 36
    config.data.phantom_images = 48
    config.train.batch_size = 8
    config.train.epochs = 12.0
    config.train.log_every_steps = 1
    config.train.checkpoint_every_epochs = 0.33  # Each step, of three an epoch.
    config.eval.batch_size = 4
    config.eval.bootstrap = 20
    config.tta.k = 3
    config.tta.patch = 8
    return config
