"""What a data set is, kept with every checkpoint, and how two of them differ."""

import hashlib

from cxai_jax.data.records import Dataset, Records


def identity(dataset: Dataset) -> dict:
    """JSON values that change with the data, their labels or their splits."""
    return {
        "name": dataset.name,
        "class_names": list(dataset.class_names),
        "positive": dataset.class_names[dataset.positive],
        "site_names": list(dataset.site_names),
        "split_scheme": dataset.split_scheme,
        "fingerprint": dataset.fingerprint,
        "counts": {name: len(records) for name, records in dataset.splits.items()},
        "listed": {name: listed(records) for name, records in dataset.splits.items()},
    }


def listed(records: Records) -> str:
    """SHA-256 over names, labels and sites of a split, whatever their order."""
    rows = zip(records.names, records.labels, records.sites, strict=True)
    lines = sorted(f"{name}\t{int(label)}\t{int(site)}" for name, label, site in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def differences(there: dict, here: dict) -> str:
    """How two identities differ, in words; "" where they do not.

    Only what both say is compared: an identity of an earlier version says less.
    """
    found = [
        f"{words} {there[key]!r} there and {here[key]!r} here"
        for key, words in (
            ("name", "the name is"),
            ("class_names", "the classes are"),
            ("positive", "the positive class is"),
            ("site_names", "the sites are"),
            ("split_scheme", "the split is"),
        )
        if key in there and there[key] != here[key]
    ]
    new = here["counts"]
    old = there.get("counts", new)
    lists = there.get("listed", {})
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = old.get(name, "no"), new.get(name, "no")
            found.append(f"{name} has {was} images there and {now} here")
        elif name in lists and lists[name] != here["listed"][name]:
            found.append(f"{name} has {old[name]} images, but not the same ones")
    if (
        not found
        and there.get("fingerprint", here["fingerprint"]) != (here["fingerprint"])
    ):
        found = ["the pixels of some images, or their order, differ"]
    return "; ".join(found)
