"""The one config of the tests that need a run: seconds on two cores."""

from configs import demo


def small(row: str = "full", **changes):
    """The demo at 32 pixels; `changes` are fields by dotted name."""
    config = demo.get_config(row)
    config.data.image_size = 32
    config.data.resize = 36
    config.data.phantom_images = 48
    config.train.batch_size = 8
    config.train.epochs = 2.0
    config.train.log_every_steps = 1
    config.train.checkpoint_every_epochs = 1.0
    config.eval.batch_size = 8
    config.eval.bootstrap = 50
    config.tta.k = 3
    config.tta.patch = 8
    config.update_from_flattened_dict(changes)
    return config
