"""`DATASETS`: name -> `DatasetSpec`, one line for each data set."""

from ml_collections import ConfigDict

from cxai_jax.data import (
    covidx_ct,
    cxr,
    digits,
    folder,
    folds,
    phantom,
    sites,
    tfds_sets,
)
from cxai_jax.data.records import Dataset, DatasetSpec

DATASETS: dict[str, DatasetSpec] = {
    "phantom": phantom.SPEC,
    "site_a": sites.SITE_A,
    "site_b": sites.SITE_B,
    "joint": sites.JOINT,
    "cxr": cxr.SPEC,
    "covidx_ct": covidx_ct.SPEC,
    "covidx_ct_binary": covidx_ct.BINARY,
    "folder": folder.SPEC,
    "mnist": digits.MNIST,
    "usps": digits.USPS,
    "mnist_m": digits.MNIST_M,
    "tfds": tfds_sets.SPEC,
}
NAMED = ("folder", "tfds")  # Whose own names follow behind a colon.


def load(data_config: ConfigDict) -> Dataset:
    """Opens the data set `config.data.name`; "folder:x" is the folder prepared as x,
    "tfds:x" what TFDS left on disk as x.

    With `config.data.fold` its images are split anew, see `folds.refold`.

    Raises:
      ValueError: for an unknown name, listing the known ones, or an impossible fold.
    """
    dataset = spec_of(data_config.name).load(data_config)
    if not data_config.fold:
        return dataset
    return folds.refold(dataset, data_config.fold, data_config.split_seed)


def spec_of(name: str) -> DatasetSpec:
    """The declaration of the data set `config.data.name`.

    Raises:
      ValueError: for an unknown name; it lists the known ones.
    """
    kind, _, directory = name.partition(":")
    if kind not in DATASETS or (directory and kind not in NAMED):
        raise ValueError(
            f"config.data.name is {name!r}; known: {', '.join(DATASETS)}, folder:NAME, "
            "tfds:NAME"
        )
    return DATASETS[kind]


def check_channels(name: str, other: str, given: str) -> None:
    """Raises ValueError unless two data sets store images of as many channels.

    Args:
      name: of the run's data set, as config.data.name.
      other: likewise, of the one that is used beside it.
      given: where it was named.
    """
    own, others = spec_of(name).channels, spec_of(other).channels
    if own != others:
        raise ValueError(
            f"{given}: images of {other} have {others} channels, those of {name} "
            f"{own}; prepare both alike"
        )
