"""The two chest-CT sites of the paper, COVID-19 against not.

site_a: SARS-CoV-2 CT (Soares et al., 2020), `COVID/` and `non-COVID/`, no patients.
site_b: COVID-CT (Zhao et al., 2020), `CT_COVID/` and `CT_NonCOVID/`, official split,
patients known. joint: both, as sites 0 and 1 (Wang et al., 2020).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cxai_jax.data import splits, store, tables
from cxai_jax.data.plan import Plan, Source, class_files
from cxai_jax.data.reading import printable
from cxai_jax.data.records import SPLITS, Dataset, DatasetSpec, concatenate

CLASS_NAMES = ("non-COVID-19", "COVID-19")
POSITIVE = 1
SITE_A_FOLDERS = ("non-COVID", "COVID")  # In the order of CLASS_NAMES.
SITE_B_FOLDERS = ("CT_NonCOVID", "CT_COVID")
SITE_A_SPLITS = {
    "blocked": "blocked",
    "random": "random (image-level)",
    "wang": "wang (given split files)",
}
SITE_B_SPLITS = {"official": "official", "wang": SITE_A_SPLITS["wang"]}
SITE_B_TABLES = {  # CSV with the patients of each class, its two columns.
    "CT_NonCOVID": ("NonCOVID-CT-MetaInfo.csv", "image name", "patient id"),
    "CT_COVID": ("COVID-CT-MetaInfo.csv", "File name", "Patient ID"),
}
WANG_LABELS = {"normal": 0, "non-COVID": 0, "0": 0, "COVID-19": 1, "COVID": 1, "1": 1}


def load_site_a(data_config: ConfigDict) -> Dataset:
    """Prepared site A; `split`: blocked (default), random or wang."""
    _known(data_config.split, SITE_A_SPLITS, "site_a")
    return store.load("site_a", data_config.split or "blocked", data_config.data_dir)


def load_site_b(data_config: ConfigDict) -> Dataset:
    """Prepared site B; `split`: official (default) or wang."""
    _known(data_config.split, SITE_B_SPLITS, "site_b")
    return store.load("site_b", data_config.split or "official", data_config.data_dir)


def load_joint(data_config: ConfigDict) -> Dataset:
    """Sites A and B pooled; `split` is site A's, site B's is official.

    With `split` wang both have that of Wang et al. (2020b).
    """
    first = load_site_a(data_config)
    own = "wang" if data_config.split == "wang" else "official"
    second = store.load("site_b", own, data_config.data_dir)
    pooled = {}
    for key in SPLITS:
        parts = [
            _at_site(dataset.splits[key], site)
            for site, dataset in enumerate((first, second))
            if key in dataset.splits
        ]
        if parts:
            pooled[key] = concatenate(parts)
    both = (first, second)
    named = [(dataset.site_names[0], dataset) for dataset in both]
    return Dataset(
        name="joint",
        splits=pooled,
        class_names=CLASS_NAMES,
        site_names=tuple(site for site, _ in named),
        positive=POSITIVE,
        split_scheme=", ".join(f"{site}: {d.split_scheme}" for site, d in named),
        fingerprint=hashlib.sha256(
            "".join(dataset.fingerprint for dataset in both).encode()
        ).hexdigest(),
        leakage={
            "verdict": " | ".join(f"{s}: {d.leakage['verdict']}" for s, d in named),
            **{site: dataset.leakage for site, dataset in named},
        },
    )


def plan_site_a(
    source: str | Path, split: str = "", split_files: Sequence[str | Path] = ()
) -> Plan:
    """Reads the folders of site A.

    Args:
      source: folder that holds COVID/ and non-COVID/.
      split: "blocked" (contiguous runs of file numbers), "random", or "wang".
      split_files: for "wang", lists with lines `id path label`, label normal or
        COVID-19; "train", "val" or "test" in the file's name says which.

    Raises:
      FileNotFoundError: for a missing folder or list, or a list that names an absent
        image.
      ValueError: for an unknown split, a file without number, a malformed list.
    """
    split = split or ("wang" if split_files else "blocked")
    _known(split, SITE_A_SPLITS, "site_a")
    files, labels, names = _class_files(Path(source), SITE_A_FOLDERS)
    unlisted = []
    if split == "wang":
        listed = _wang(split_files, source, dict(zip(names, labels, strict=True)))
        chosen = np.array([listed.get(name, "") for name in names])
        unlisted = [(n, "in no split file") for n in names if n not in listed]
    elif split == "random":
        chosen = splits.random_stratified(labels)
    else:
        chosen = splits.blocked([file_number(file) for file in files], labels)
    sources = [
        Source(file, name, int(label), str(part))
        for file, name, label, part in zip(files, names, labels, chosen, strict=True)
        if part
    ]
    return Plan(
        name="site_a",
        split=split,
        split_scheme=SITE_A_SPLITS[split],
        class_names=CLASS_NAMES,
        site_names=("site_a",),
        positive=POSITIVE,
        sources=sources,
        unlisted=unlisted,
    )


def plan_site_b(
    source: str | Path, split: str = "", split_files: Sequence[str | Path] = ()
) -> Plan:
    """Reads the folders, split lists and patient tables of site B.

    Args:
      source: folder that holds CT_COVID/, CT_NonCOVID/, Meta-data/ and, for the
        official split, Data-split/.
      split: "official" or "wang".
      split_files: for "wang", as in `plan_site_a`.

    Raises:
      FileNotFoundError: for a missing folder, list or table, or a list that names an
        absent image.
      ValueError: for an unknown split, an image in two lists, a malformed list, or an
        image in no official list.
    """
    split = split or ("wang" if split_files else "official")
    _known(split, SITE_B_SPLITS, "site_b")
    source = Path(source)
    files, labels, names = _class_files(source, SITE_B_FOLDERS)
    patients = {}
    for folder in SITE_B_FOLDERS:
        table, key, value = SITE_B_TABLES[folder]
        table = tables.read_table(source / "Meta-data" / table, key, value)
        patients |= {f"{folder}/{name}": patient for name, patient in table.items()}
    unlisted = []
    if split == "wang":
        chosen = _wang(split_files, source, dict(zip(names, labels, strict=True)))
        unlisted = [(n, "in no split file") for n in names if n not in chosen]
    else:
        chosen = _official(source, names)
    return Plan(
        name="site_b",
        split=split,
        split_scheme=SITE_B_SPLITS[split],
        class_names=CLASS_NAMES,
        site_names=("site_b",),
        positive=POSITIVE,
        sources=[
            Source(file, name, int(label), chosen[name], patients.get(name, ""))
            for file, name, label in zip(files, names, labels, strict=True)
            if name in chosen
        ],
        unlisted=unlisted,
    )


def _official(source: Path, names: Sequence[str]) -> dict[str, str]:
    """Image name -> split, from the official lists of site B."""
    chosen: dict[str, str] = {}
    for folder in SITE_B_FOLDERS:
        kind = folder.removeprefix("CT_")
        for part in SPLITS:
            listing = source / "Data-split" / kind / f"{part}{folder}.txt"
            for name in tables.read_list(listing):
                _assign(chosen, f"{folder}/{name}", part, listing, names)
    missing = [name for name in names if name not in chosen]
    if missing:
        raise ValueError(
            f"{source / missing[0]} is in none of the lists of {source / 'Data-split'} "
            f"({len(missing)} such images); list it or remove it"
        )
    return chosen


def _known(split: str, known: Sequence[str], dataset: str) -> None:
    if split and split not in known:
        raise ValueError(
            f"unknown split {split!r} of {dataset}; known: {', '.join(known)}"
        )


def _at_site(records, site: int):
    return replace(records, sites=np.full(len(records), site, np.int32))


def _class_files(source: Path, folders: Sequence[str]) -> tuple[list, np.ndarray, list]:
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such folder; give --source the folder that holds "
            f"{' and '.join(f'{folder}/' for folder in folders)}"
        )
    files = [class_files(source, folder) for folder in folders]
    labels = np.repeat(np.arange(len(files)), [len(part) for part in files])
    flat = [file for part in files for file in part]
    return flat, labels, [printable(file.relative_to(source)) for file in flat]


def file_number(file: str | Path) -> int:
    """Site A's order of acquisition: 12 of "COVID/Covid (12).jpg"."""
    found = re.search(r"\((\d+)\)", Path(file).name)
    if not found:
        raise ValueError(
            f"{file}: no number in brackets, as in 'Covid (12).jpg', which the blocked "
            "split needs; rename it or use --split=random"
        )
    return int(found[1])


def _assign(chosen: dict, name: str, part: str, listing, names: Sequence[str]) -> None:
    if name not in names:
        raise FileNotFoundError(
            f"{listing} names {name!r}, but there is no such image; restore it or "
            "remove the line"
        )
    if name in chosen:
        raise ValueError(
            f"{listing} names {name!r}, which is already listed in {chosen[name]}; "
            "keep one line"
        )
    chosen[name] = part


def _wang(split_files: Sequence, source, labels: dict[str, int]) -> dict[str, str]:
    """Image name -> split, from the lists of Wang et al."""
    if not split_files:
        raise ValueError("--split=wang needs --split_files=TRAIN.txt,TEST.txt")
    by_file = {Path(name).name: name for name in labels}
    chosen: dict[str, str] = {}
    for listing in split_files:
        part = [key for key in SPLITS if key in Path(listing).name.lower()]
        if len(part) != 1:
            raise ValueError(
                f"{listing}: the file name must hold one of {', '.join(SPLITS)}"
            )
        for line in tables.read_list(listing):
            if "/ c o" in line:  # Where the published reader stops.
                break
            # The path may hold spaces: "12 new_data/Covid (3).jpg COVID-19".
            words = line.split()
            if len(words) < 3 or words[-1] not in WANG_LABELS:
                raise ValueError(
                    f"{listing}: the line {line!r} is not `id path label` with a label "
                    f"among {', '.join(WANG_LABELS)}"
                )
            label, file = words[-1], Path(" ".join(words[1:-1])).name
            name = by_file.get(file, file)
            _assign(chosen, name, part[0], listing, labels)
            if labels[name] != WANG_LABELS[label]:
                raise ValueError(
                    f"{listing} labels {name!r} as {label}, but it lies in the other "
                    f"class folder of {source}"
                )
    return chosen


SITE_A = DatasetSpec(load_site_a, plan_site_a)
SITE_B = DatasetSpec(load_site_b, plan_site_b)
JOINT = DatasetSpec(load_joint)
