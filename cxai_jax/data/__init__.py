"""`DATASETS`: name -> function of `config.data` that returns a `Dataset`."""

from collections.abc import Callable

from ml_collections import ConfigDict

from cxai_jax.data import cxr, folder, folds, phantom, sites
from cxai_jax.data.records import Dataset

DATASETS: dict[str, Callable[[ConfigDict], Dataset]] = {
    "phantom": phantom.load,
    "site_a": sites.load_site_a,
    "site_b": sites.load_site_b,
    "joint": sites.load_joint,
    "cxr": cxr.load,
    "folder": folder.load,
}


def load(data_config: ConfigDict) -> Dataset:
    """Opens the data set `config.data.name`; "folder:x" is the folder prepared as x.

    With `config.data.fold` its images are split anew, see `folds.refold`.

    Raises:
      ValueError: for an unknown name, listing the known ones, or an impossible fold.
    """
    name, _, directory = data_config.name.partition(":")
    if name not in DATASETS or (directory and name != "folder"):
        raise ValueError(
            f"unknown data set config.data.name={data_config.name!r}; known: "
            f"{', '.join(DATASETS)}, folder:NAME"
        )
    dataset = DATASETS[name](data_config)
    if not data_config.fold:
        return dataset
    return folds.refold(dataset, data_config.fold, data_config.split_seed)
