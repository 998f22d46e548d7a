"""Scores of several systems with their intervals, paired differences and power.

A system has one set of predictions for each seed: those of a test split, or those of
all folds pooled, every image scored by the network that has not seen it. One draw of
the bootstrap takes patients and seeds with replacement, the same for all systems, so a
difference is paired by image. With few seeds their part is underestimated (by half
with two), and with one it is left out: the interval is then one of these networks.
"""

from collections.abc import Sequence

import numpy as np

from cxai_jax.scoring import metrics

RESAMPLES = 2000
# An effect of 2.8 standard errors is found (two-sided, 5 %) with a power of 80 %:
# 1.96 + 0.84.
POWER = 2.8
Page = tuple[str, list[list[str]]]  # Title, and rows of cells below a head.
RATES = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")


def pool(parts: Sequence[dict]) -> dict:
    """One run of the predictions of several folds.

    Args:
      parts: runs, see `compare`.

    Raises:
      ValueError: if an image is in two of them.
    """
    columns = [
        name for name, value in parts[0].items() if isinstance(value, np.ndarray)
    ]
    columns = [name for name in columns if all(name in part for part in parts)]
    pooled = {name: np.concatenate([part[name] for part in parts]) for name in columns}
    names, times = np.unique(pooled["names"], return_counts=True)
    if times.max() > 1:
        twice = str(names[times.argmax()])
        raise ValueError(f"{twice!r} was tested in two folds")
    order = np.argsort(pooled["names"], kind="stable")
    constants = {n: v for n, v in parts[0].items() if not isinstance(v, np.ndarray)}
    return constants | {name: value[order] for name, value in pooled.items()}


def averaged(by_seed: dict[int, dict]) -> dict[str, dict]:
    """One run, under "all": the mean of all seeds' probabilities, without votes.

    It has no seed in common with any system, so `compare` takes no difference.

    Raises:
      ValueError: if they were tested on different images.
    """
    first, *others = (by_seed[seed] for seed in sorted(by_seed))
    if any(run["names"].tolist() != first["names"].tolist() for run in others):
        raise ValueError("networks of different test images cannot be averaged")
    probs = np.mean([run["probs"] for run in (first, *others)], axis=0)
    kept = {k: v for k, v in first.items() if k not in ("voted", "opposing")}
    return {"all": kept | {"probs": probs, "chosen": probs.argmax(1)}}


def compare(runs: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """Every score of every system.

    Args:
      runs: system -> seed -> run, a dict of `names`, `patients` ("" unknown), `labels`,
        `sites`, `probs` [N, K], `chosen` (labels before voting), perhaps `voted`, and
        `positive` (class index), `site_names`, perhaps `rated` (names of all classes,
        where each is to be rated). The first system is the reference.

    Returns:
      system -> score -> {"mean", "sd", "low", "high", "seeds"}; a paired difference, of
      two systems or before and after voting, also has "detectable", the smallest that
      this design could have found. Except for the reference a score has "difference",
      over the seeds that both systems have.

    Raises:
      ValueError: if a system was tested on other images than the reference.
    """
    reference = next(iter(runs))
    for system, by_seed in runs.items():
        for seed in by_seed.keys() & runs[reference].keys():
            one, other = runs[reference][seed], by_seed[seed]
            if one["names"].tolist() != other["names"].tolist():
                raise ValueError(
                    f"{reference} and {system} were tested on different images with "
                    f"seed {seed}; give both the same --set data.split"
                )
    every = [run for by_seed in runs.values() for run in by_seed.values()]
    everybody = np.unique(np.concatenate([persons(run) for run in every]))
    random, count = np.random.default_rng(0), len(everybody)
    draws = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    draws = np.concatenate([np.ones((1, count), int), draws])  # Row 0: all.
    found = {
        system: {
            seed: scores(draws[:, np.searchsorted(everybody, persons(run))], run)
            for seed, run in by_seed.items()
        }
        for system, by_seed in runs.items()
    }
    table = {}
    for system, by_seed in found.items():
        both = sorted(by_seed.keys() & found[reference].keys())
        table[system] = {}
        for name in next(iter(by_seed.values())):
            values = np.stack([by_seed[seed][name] for seed in sorted(by_seed)])
            row = table[system][name] = spread(values)
            if name.startswith("gain"):
                row["detectable"] = detectable(values)
            if system != reference and both and name in found[reference][both[0]]:
                gain = np.stack(
                    [by_seed[s][name] - found[reference][s][name] for s in both]
                )
                row["difference"] = spread(gain) | {"detectable": detectable(gain)}
    return table


def persons(run: dict) -> np.ndarray:
    """Whom an image is of; an image without a patient is alone."""
    return np.where(run["patients"] == "", run["names"], run["patients"])


def resampled(values: np.ndarray) -> np.ndarray:
    """Means over drawn seeds: [seeds, 1 + resamples], column 0 undrawn -> [resamples].

    The draw of seeds depends on their number alone, so that all systems share it.
    """
    seeds = len(values)
    drawn = np.random.default_rng(1).multinomial(
        seeds, np.full(seeds, 1 / seeds), size=values.shape[1] - 1
    )
    return np.sum(drawn.T / seeds * values[:, 1:], axis=0)


def spread(values: np.ndarray) -> dict:
    """Mean, deviation and interval of [seeds, 1 + resamples], column 0 unresampled."""
    drawn, own = resampled(values), values[:, 0]
    drawn = drawn[np.isfinite(drawn)]  # A draw of one class has no AUC.
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    return {
        "mean": float(own.mean()),
        "sd": float(own.std(ddof=1)) if len(own) > 1 else None,
        "low": float(low),
        "high": float(high),
        "seeds": own.tolist(),
    }


def detectable(values: np.ndarray) -> float:
    """The difference that would be significant in four designs of five like this one.

    2.8 standard errors, of the paired bootstrap.
    """
    drawn = resampled(values)
    drawn = drawn[np.isfinite(drawn)]
    return float(POWER * drawn.std(ddof=1)) if len(drawn) > 1 else float("nan")


def scores(weights: np.ndarray, run: dict) -> dict[str, np.ndarray]:
    """RATES, AUC and AUPRC, of all images and of each site; see also `of_classes`.

    Args:
      weights: [R, N], how often each image counts.
      run: see `compare`.

    Returns:
      Score -> [R]; with votes also "... after voting" and "gain in ... by voting", and
      with several sites all of it again, "..., SITE".
    """
    found = _scores(weights, run, np.ones(len(run["labels"]), bool))
    if len(run["site_names"]) > 1:
        for site, name in enumerate(run["site_names"]):
            rows = run["sites"] == site
            if rows.any():
                own = _scores(weights, run, rows)
                found |= {f"{score}, {name}": value for score, value in own.items()}
    return found


def _scores(weights, run: dict, rows: np.ndarray) -> dict[str, np.ndarray]:
    weights, labels, positive = weights[:, rows], run["labels"][rows], run["positive"]
    rated = run.get("rated", ())
    found = decisions(weights, labels, run["chosen"][rows], positive)
    found |= of_classes(weights, labels, run["chosen"][rows], rated)
    ranked = (labels == positive, run["probs"][rows][:, positive], weights)
    found["auc"] = metrics.weighted_auc(*ranked)
    found["auprc"] = metrics.weighted_average_precision(*ranked)
    if "voted" in run:
        after = decisions(weights, labels, run["voted"][rows], positive)
        found |= {f"{name} after voting": value for name, value in after.items()}
        found |= {
            f"gain in {name} by voting": value - found[name]
            for name, value in after.items()
        }
        each = of_classes(weights, labels, run["voted"][rows], rated)
        found |= {f"{name} after voting": value for name, value in each.items()}
    return found


def of_classes(
    weights: np.ndarray, labels: np.ndarray, chosen: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Weighted sensitivity and PPV of each class and their means, [R]; 0/0 is 0.

    Args: as `decisions`, and
      names: of the classes; none: the result is empty.
    """
    found = {}
    for c, name in enumerate(names):
        rates = decisions(weights, labels, chosen, c)
        found[f"sensitivity {name}"] = rates["recall"]
        found[f"PPV {name}"] = rates["precision"]
    for kind in ("sensitivity", "PPV") if names else ():
        of_kind = [value for name, value in found.items() if name.startswith(kind)]
        found[f"macro {kind}"] = np.mean(of_kind, axis=0)
    return found


def decisions(
    weights: np.ndarray, labels: np.ndarray, chosen: np.ndarray, positive: int
) -> dict[str, np.ndarray]:
    """Weighted RATES, the last three of the positive class, each [R]; 0/0 is 0.

    Balanced accuracy is the mean recall of the classes that a draw holds.
    """
    true, said = labels == positive, chosen == positive
    hits, asked, given = (weights @ x.astype(int) for x in (true & said, true, said))
    of_class = labels == np.unique(labels)[:, None]
    right = weights @ (of_class & (labels == chosen)).astype(int).T
    held = weights @ of_class.astype(int).T
    recalls = right / np.maximum(held, 1)
    rates = (
        (right.sum(1), weights.sum(1)),
        (recalls.sum(1), (held > 0).sum(1)),
        (hits, given),
        (hits, asked),
        (2 * hits, asked + given),
    )
    return {
        name: top / np.maximum(bottom, 1)
        for name, (top, bottom) in zip(RATES, rates, strict=True)
    }


def shown(value: dict, sign: str = "") -> str:
    """ "81.3 ± 1.2 (78.0 to 84.1)" in percent."""
    sd = "" if value["sd"] is None else f" ± {100 * value['sd']:.1f}"
    mean, low, high = (f"{100 * value[k]:{sign}.1f}" for k in ("mean", "low", "high"))
    return f"{mean}{sd} ({low} to {high})"


def describe(table: dict[str, dict]) -> str:
    """The table as text, in percent."""
    lines = ["mean ± sd over seeds (95 % interval over patients and seeds), percent"]
    for system, values in table.items():
        lines.append(system)
        for name, value in values.items():
            line = f"  {name:<26} {shown(value):<28}"
            if gain := value.get("difference"):
                line += f" difference {shown(gain, '+')}, "
                line += f"detectable {100 * gain['detectable']:.1f}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def pages(table: dict[str, dict]) -> list[Page]:
    """The table as pages, for `markdown` and `latex`."""
    names = list(dict.fromkeys(name for values in table.values() for name in values))
    gains = [name for name in names if name.startswith("gain")]
    plain = [name for name in names if name not in gains]
    voted = [name for name in plain if "voting" in name]
    groups = [("before voting", [name for name in plain if name not in voted])]
    groups += [("after voting", voted)] if voted else []
    found = []
    for title, columns in groups:
        head = ["", *(name.replace(" after voting", "") for name in columns)]
        rows = [
            [system, *(shown(v[n]) if n in v else "" for n in columns)]
            for system, v in table.items()
        ]
        rows = [row for row in rows if any(row[1:])]  # Some never vote.
        found.append(
            (f"Scores {title}: mean ± sd over seeds (95 % interval)", [head, *rows])
        )
        rows = [
            [
                system,
                *(_gain(v[n].get("difference")) if n in v else "" for n in columns),
            ]
            for system, v in list(table.items())[1:]
        ]
        rows = [row for row in rows if any(row[1:])]
        if rows:
            reference = next(iter(table))
            found.append(
                (
                    f"Difference to {reference} {title} [smallest detectable]",
                    [head, *rows],
                )
            )
    if gains:
        head = ["", *(name.removeprefix("gain in ") for name in gains)]
        rows = [
            [system, *(_gain(v.get(name)) for name in gains)]
            for system, v in table.items()
            if gains[0] in v
        ]
        found.append(("Gain by voting [smallest detectable]", [head, *rows]))
    return found


def _gain(value: dict | None) -> str:
    if value is None:
        return ""
    return f"{shown(value, '+')} [{100 * value['detectable']:.1f}]"


def markdown(pages: Sequence[Page]) -> str:
    """Pages, as `pages` gives them, as Markdown tables."""
    text = ""
    for title, (head, *rows) in pages:
        text += f"**{title}**\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|\n"
        text += "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n"
    return text


def latex(pages: Sequence[Page]) -> str:
    """Pages, as `pages` gives them, as LaTeX tabulars."""
    text = ""
    for title, (head, *rows) in pages:
        text += f"% {title}\n\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\hline\n"
        text += f"{_escaped(head)}\n\\hline\n"
        text += "".join(f"{_escaped(row)}\n" for row in rows)
        text += "\\hline\n\\end{tabular}\n\n"
    return text


def _escaped(cells: Sequence[str]) -> str:
    line = " & ".join(cells)
    for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$")):
        line = line.replace(plain, escaped)
    return line + r" \\"
