"""What `cxai-predict` does once it is loaded: files to a table and a page."""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

from cxai_jax import data, disk, host, progress, signals
from cxai_jax.data import inputs, novelty, pipeline, reading, transforms
from cxai_jax.data.privacy import pseudonym
from cxai_jax.inference import bundle
from cxai_jax.inference.choices import CONTINUES
from cxai_jax.inference.decisions import make_rule
from cxai_jax.inference.predictor import Predictor, chosen_sites, load, over_sites
from cxai_jax.inference.shown_maps import make_maps
from cxai_jax.inference.table import (
    OVERLAY_HEIGHT,
    Answer,
    Prepared,
    Table,
    finish,
    read,
    row,
)
from cxai_jax.mesh import scoring_mesh
from cxai_jax.report import pictures
from cxai_jax.report.prediction_page import tally_sentence
from cxai_jax.writer import read_json, write_json

NOT_FINITE = (
    "the network's probabilities are not finite; its weights are damaged or its "
    "training diverged, use another run"
)


def run(given: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> int:
    """Does what the command line says; returns the exit code, see predict.py.

    Args:
      given: of `predict.parse`.
      refuse: ends the command, which was given something that cannot be, in one line.
    """
    host.keep_freed_memory()
    host.one_device_a_core()
    disk.quiet_callbacks()
    logging.getLogger("jax").setLevel(logging.WARNING)
    for noisy in ("absl", "orbax"):  # What orbax logs as an error it raises as well.
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # What pydicom cannot read becomes an error of ours; importing it resets its level.
    logging.getLogger("pydicom").addHandler(logging.NullHandler())
    logging.getLogger("pydicom").propagate = False
    warnings.filterwarnings("ignore", module="pydicom")
    if not (place := disk.nearest(given.out)).is_dir():
        refuse(
            f"--out={given.out}: there is a file where a folder is needed, {place}; "
            "choose another --out"
        )
    done = given.out / "predictions.csv"
    if given.workdir and given.workdir.is_dir():
        cache = given.workdir.absolute() / "xla_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    found = inputs.find([*given.images, *given.more])
    found = without(found, given.out)
    errors = list(found.errors)
    about = {"model": given.model} if given.model else {"workdir": str(given.workdir)}
    if not found.files and not errors:
        errors.append(("--images", "no files were named; give files, folders or globs"))
    with signals.at_once(progress.where):
        try:
            with progress.stage("loading the model"):
                folder = bundle.locate(given.model) if given.model else given.workdir
                model = bundle.read(folder) if given.model else load(folder)
                known = novelty.load(folder)
                features = novelty.load_features(folder)
        except (ValueError, FileNotFoundError, ImportError) as error:
            if done.exists():  # Its page stays as it is.
                refuse(str(error))
            given.out.mkdir(parents=True, exist_ok=True)
            errors.append((str(given.model or given.workdir), str(error)))
            counts = tally(found, 0, len(found.errors))
            return conclude(given.out, [], errors, None, about, counts)
        if given.votes is not None:
            cells = (model.config.data.image_size // model.config.tta.patch) ** 2
            if not 0 <= given.votes <= cells:
                refuse(f"--votes={given.votes} must be 0..{cells}, the image's cells")
            model.config.tta.k = given.votes
        try:
            sites = chosen_sites(model, given.site)
            rule = make_rule(model.results, given.operating_point)
            answer = Answer(model, given.map, rule, features, given.overlays)
            programs = given.workdir and given.workdir / "executables"
            mesh = scoring_mesh(model.config.eval.batch_size)
            predictor = Predictor(model, mesh, programs)
            draw = make_maps(model, given.map, predictor.batch_size, mesh)
            spec = data.spec_of(model.config.data.name)
        except ValueError as error:
            refuse(str(error))
    if sites:
        about["sites"] = list(sites)
    about |= {"step": model.step, "tta": model.config.tta.to_dict()}
    about |= {"map": given.map, "overlays": given.overlays}
    about |= {"decision": answer.rule.text}
    about["patient ids"] = "as given" if given.keep_ids else "hashed"
    about = json.loads(json.dumps(about | {"window": given.window}))
    (given.out / "overlays").mkdir(parents=True, exist_ok=True)
    rows = []
    if done.exists():
        made = given.out / "about.json"
        try:
            same = made.exists() and read_json(made) == about
            rows = read(done, model.class_names, shown(sites)) if same else []
        except ValueError as error:
            refuse(f"{error}; choose another --out")
        if not same:
            refuse(
                f"{done} was made with another model, --votes, --site, --window, "
                "--map, --overlays, --keep_ids or --operating_point; choose another "
                "--out"
            )
    write_json(given.out / "about.json", about)
    with signals.StopSignal():  # Until the page is written as well.
        rows, signal, counts = predict(
            answer, predictor, draw, known, found, errors, rows, given, sites, spec
        )
        about["ignored files"] = found.ignored
        about["rows of patients.csv that name no image"] = found.unmatched
        code = conclude(given.out, rows, errors, answer, about, counts)
    if signal:
        print(f"stopped; {CONTINUES}")
    return 128 + signal if signal else code


def without(found: inputs.Found, out: Path) -> inputs.Found:
    """What was found but our own output, which may lie in the folder of the images."""
    ours = os.path.realpath(out) + os.sep

    def other(path: str | Path) -> bool:
        return not os.path.realpath(path).startswith(ours)

    return found._replace(
        files=list(filter(other, found.files)),
        ignored=list(filter(other, found.ignored)),
    )


def shown(sites: dict[str, int]) -> list[str]:
    """The sites with columns of their own: one site's answer is the answer."""
    return list(sites) if len(sites) > 1 else []


def tally(found: inputs.Found, predicted: int, failed: int) -> dict[str, int]:
    """Counts of paths that add up: found = predicted + failed + ignored + left."""
    total = len(found.files) + len(found.errors) + len(found.ignored)
    return {
        "found": total,
        "predicted": predicted,
        "failed": failed,
        "ignored": len(found.ignored),
        "left": total - predicted - failed - len(found.ignored),
        "unmatched": len(found.unmatched),
    }


def predict(
    answer, predictor, draw, known, found, errors, rows, given, sites, spec
) -> tuple[list[dict], int, dict[str, int]]:
    """Predicts the files that have no row yet, as of `sites`; adds to `errors`.

    Every file is prepared as `spec`, of the run's data set, stores its images.

    Returns:
      All rows, the signal that stopped it or 0, and the counts of `tally`.
    """
    model, out = answer.model, given.out
    size = model.config.data.image_size
    salt = str(model.results["data"].get("fingerprint"))
    network_input = pipeline.fit_for_scoring(model.config)
    done = {row["file"] for row in rows}  # Frames of a file have rows of their own.
    table = Table(out / "predictions.csv", model.class_names, rows, shown(sites))

    def prepare(path: Path) -> list[Prepared]:
        patient = found.patients.get(path, "")
        return [
            Prepared(
                one.name,
                one.patient if given.keep_ids else pseudonym(one.patient, salt),
                one.notes + novelty.flags(one.gray, known, size),
                network_input(transforms.as_stored(one.pixels, spec.side)),
                pictures.shrink(one.gray[..., 0], OVERLAY_HEIGHT),
            )
            for one in inputs.open_slices(
                path, window=given.window, patient=patient, channels=spec.channels
            )
            if one.name not in done
        ]

    files = [path for path in found.files if reading.printable(path) not in done]
    waiting, begun, number, saved, stopped = [], time.monotonic(), 0, 0, 0
    opened_names, failed, lost = [], len(found.errors), set()
    predicting = progress.stage("predicting", len(files), "files")
    drawing, pool = deque(), ThreadPoolExecutor(reading.READERS)

    def keep(most: int) -> None:
        """Writes the rows of all batches but the last `most`."""
        while len(drawing) > most:
            table.add([one.result() for one in drawing.popleft()])

    with signals.StopSignal() as stop, predicting as show, pool:
        for place, (path, opened) in enumerate(reading.read_ahead(files, prepare), 1):
            if isinstance(opened, ValueError):
                name = reading.printable(path)
                errors.append((name, str(opened).removeprefix(f"{name}: ")))
                failed += 1
            else:
                opened_names.append([one.name for one in opened])
                waiting += opened
            full = predictor.batch_size
            last, before = place == len(files), number
            while (len(waiting) >= full or (waiting and last)) and not stop.asked:
                batch, waiting = waiting[:full], waiting[full:]
                images = np.stack([one.input for one in batch])
                with compiling() if not number else nullcontext():
                    answers = {
                        name: predictor(images, np.full(len(images), site))
                        for name, site in sites.items()
                    }
                    if sites:
                        outcome = over_sites(list(answers.values()))
                    else:
                        outcome = predictor(images)
                    maps = draw(images, outcome, sites)
                finite = np.isfinite(outcome.probs).all(1)
                unlike = novelty.foreign(outcome.pooled[finite], answer.features)
                bad = [batch[i].name for i in np.flatnonzero(~finite)]
                errors += [(name, NOT_FINITE) for name in bad]
                lost.update(bad)
                by_site = {name: answers[name] for name in shown(sites)}
                told = answer, out, by_site
                drawing.append(
                    [
                        pool.submit(row, batch[i], outcome, i, maps[i], foreign, *told)
                        for i, foreign in zip(
                            np.flatnonzero(finite), unlike, strict=True
                        )
                    ]
                )
                keep(1)  # The other is drawn while the next batch is predicted.
                number += len(batch)
                saved += outcome.saved
            if number > before or last:
                rate = number / (time.monotonic() - begun)
                show(place, f"{place}/{len(files)} files, {rate:.1f} images/s")
            if stop.asked and (waiting or not last):
                stopped = stop.asked
                break
        keep(0)
    table.add([{"file": name, "error": text} for name, text in errors])
    table.close()
    if saved:
        every = number * model.config.tta.k * max(1, len(sites))
        print(f"early exit saved {saved} of {every} masked forward passes")
    written = {row["file"] for row in table.rows}
    predicted = len(found.files) - len(files)
    predicted += sum(written.issuperset(names) for names in opened_names)
    failed += sum(not lost.isdisjoint(names) for names in opened_names)
    return table.rows, stopped, tally(found, predicted, failed)


@contextmanager
def compiling() -> Iterator[None]:
    """The first batch, which compiles: nothing is predicted yet that could be lost."""
    with progress.stage("compiling"), signals.at_once(progress.where):
        yield


def conclude(out: Path, rows, errors, answer, about, counts) -> int:
    """Writes the page, prints errors and counts, and returns the exit code."""
    finish(out, rows, errors, answer, about, counts)
    for name, text in errors:
        print(f"error: {name}: {text}", file=sys.stderr)
    for name, text in about.get("rows of patients.csv that name no image", []):
        print(f"unmatched: {name}: {text}", file=sys.stderr)
    print(tally_sentence(counts))
    of = ""
    if rows:
        of = f", probabilities are of {answer.model.class_names[answer.model.positive]}"
    print(f"{len(rows)} images, {len(errors)} errors{of}: {out / 'report.html'}")
    return int(bool(errors)) if rows else 2
