"""Unsupervised domain adaptation: one data set with labels, another without.

The split `target` holds the target's training images with the label UNLABELLED: the
labels themselves do not enter a run before its last test. `test` is the target's.
"""

import dataclasses
import hashlib

import numpy as np

from cxai_jax.data.records import Dataset, Records

UNLABELLED = -1  # Any loss of it is NaN: reading it by mistake does not go unnoticed.


def adapt(source: Dataset, target: Dataset) -> Dataset:
    """The source's training images with labels, the target's without, its test split.

    A validation split is the source's: selecting on labels of the target would read
    them. Images keep their sizes and channels; the run resizes them to one side and
    repeats gray over three channels.

    Raises:
      ValueError: if the target has no training images, or other classes.
    """
    if source.class_names != target.class_names:
        raise ValueError(
            f"{source.name} has {len(source.class_names)} classes "
            f"({', '.join(source.class_names)}) and the target {target.name} "
            f"{len(target.class_names)} ({', '.join(target.class_names)}); "
            "config.data.target must name a data set of the same classes"
        )
    if not len(target.splits.get("train", ())):
        raise ValueError(
            f"the target {target.name} has no training images; config.data.target "
            "must name a data set with a split `train`, of which no label is read"
        )
    splits = {name: r for name, r in source.splits.items() if name in ("train", "val")}
    splits["target"] = at_site(unlabelled(target.splits["train"]), 1)
    splits["test"] = at_site(target.splits["test"], 1)
    both = (source, target)
    return Dataset(
        name=f"{source.name}->{target.name}",
        splits=splits,
        class_names=source.class_names,
        site_names=tuple(d.name for d in both),
        positive=source.positive,
        split_scheme=", ".join(f"{d.name}: {d.split_scheme}" for d in both),
        fingerprint=hashlib.sha256(
            "".join(d.fingerprint for d in both).encode()
        ).hexdigest(),
        leakage={
            "verdict": " | ".join(f"{d.name}: {d.leakage['verdict']}" for d in both),
            **{d.name: d.leakage for d in both},
        },
    )


def unlabelled(records: Records) -> Records:
    """The same images without their labels."""
    return dataclasses.replace(records, labels=np.full_like(records.labels, UNLABELLED))


def at_site(records: Records, site: int) -> Records:
    """The same records, all of one site."""
    return dataclasses.replace(records, sites=np.full_like(records.sites, site))
