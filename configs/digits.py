"""MNIST to USPS or MNIST-M: Table 4 of the CT paper, one row and one target a run.

python -m cxai_jax.main --config=configs/digits.py:full,usps --config.data.data_dir=DIR
python -m cxai_jax.main --config=configs/digits.py:dann,mnist_m,lenet,short

DIR/digits holds mnist.npz and usps.npz; MNIST-M is made from MNIST where it is missing.
Rows: source_only, snapmix, full (SnapMix + CPE, with voting), target_statistics, dann,
cycada, calibrator, dranet, dranet_tri (source, target and the third data set). Targets:
usps, mnist_m. Then, in any order: resnet18, lenet, tiny; short.

Labels are those of MNIST's training images alone, none of the target's (A26).
"""

from configs import common, rows

TARGETS = ("usps", "mnist_m")


def get_config(words: str = "source_only,usps"):
    config = common.get_config()
    config.data.name = "mnist"
    config.data.image_size = 64
    config.augment.crop = "none"
    config.augment.hflip = False  # A mirrored digit is another digit, or none.
    config.augment.vflip = False
    config.optim.lr_fresh = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.05
    config.train.epochs = 20.0
    config.eval.batch_size = 100
    rows.apply_rows(config, words, ROWS)
    config.data.resize = config.data.image_size * 5 // 4
    return config


def source_only(config):
    rows.baseline(config)


def snapmix(config):
    rows.snapmix(config)
    config.mix.prob = 0.5  # SnapMix's own choice when training from scratch.


def full(config):
    """SnapMix + CPE; voting in its multi-class form (A15), 31 cells of 1/28."""
    config.mix.prob = 0.5
    config.tta.k = 31
    config.tta.patch = 2


def target_statistics(config):
    rows.baseline(config)
    config.method = "target_statistics"


def dann(config):
    """Learning rate and its decay as Ganin et al. (2016) have them."""
    rows.baseline(config)
    config.method = "dann"
    config.optim.lr_fresh = 0.01
    config.optim.schedule = "inverse"
    config.optim.warmup = 0.0


def cycada(config):
    rows.baseline(config)
    config.method = "cycada"
    config.adapt.hidden = (500, 500)
    config.train.batch_size = 100


def calibrator(config):
    """CycleGAN on images, then a calibrator of 8 channels before the classifier."""
    rows.baseline(config)
    config.method = "calibrator"
    config.model.calibrator = 8
    config.adapt.hidden = (1000, 500)
    config.train.batch_size = 100


def dranet(config):
    rows.baseline(config)
    config.method = "dranet"
    config.adapt.width = 32
    config.adapt.lr = 1e-3
    config.train.batch_size = 32
    config.adapt.weight = 0.5
    config.adapt.style_weight = 5e3


def dranet_tri(config):
    dranet(config)
    config.data.other = "third"  # Filled in by the target.


def usps(config):
    """USPS digits fill their frame; crops let those of MNIST nearly do so."""
    config.augment.crop = "square"
    config.data.target = "usps:train"
    config.data.test = "usps:train+usps:test"  # All 9,298; the paper does not say.
    _third(config, "mnist_m:train")


def mnist_m(config):
    config.data.target = "mnist_m:train"
    config.data.test = "mnist_m:test"
    if config.method == "dranet":
        config.adapt.style_weight = 5e4  # As published into MNIST-M; back 1e4.
    _third(config, "usps:train")


def _third(config, split: str) -> None:
    if config.data.other:
        config.data.other = split


def resnet18(config):
    config.model.name = "resnet18"


def lenet(config):
    """32 px: for a CPU. The fully connected layer is LeNet's, for class maps linear."""
    config.model.name = "lenet"
    config.model.head = "flat"
    config.data.image_size = 32


def tiny(config):
    config.model.name = "tiny"
    config.data.image_size = 32


def short(config):
    """10,000 images of each domain, few epochs, small generators: for two CPU cores.

    DANN gets more of them: the weight of its adversary grows over the run, and the
    digits have to be learnt before.
    """
    config.data.digits_images = 10_000
    config.train.epochs = 10.0 if config.method == "dann" else 4.0
    if config.method in ("cycada", "calibrator", "dranet"):
        config.train.batch_size = 32
        config.train.epochs = 2.0
        config.train.eval_every_epochs = 0.5  # Where they stood when the budget ended.
        config.adapt.width = config.adapt.perceptual_width = 8
        config.adapt.blocks = 2
    if config.method == "dranet":  # Whose perceptual network is random here.
        config.adapt.content_weight = 30.0
    config.eval.bootstrap = 200


ROWS = {
    row.__name__: row
    for row in (
        source_only,
        snapmix,
        full,
        target_statistics,
        dann,
        cycada,
        calibrator,
        dranet,
        dranet_tri,
        usps,
        mnist_m,
        resnet18,
        lenet,
        tiny,
        short,
    )
}
