"""cxai-predict --workdir=RUN --images PATH... --out=DIR

The same as python -m cxai_jax.predict. With --model=DIR it takes a bundle, which
cxai-export --bundle wrote, instead of a workdir.

Writes predictions.csv, patients.csv where patients are known, overlays/*.png and
report.html to DIR. Exit code 0: everything was predicted; 1: some files were not, the
page says why; 2: nothing was; 128 + n: stopped by signal n, --resume continues.
"""

import argparse
import json
import logging
import os
import shutil
import signal as signals
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from cxai_jax import disk, host
from cxai_jax.data import inputs, novelty, pipeline, reading, transforms
from cxai_jax.data.privacy import pseudonym
from cxai_jax.inference import bundle
from cxai_jax.inference.decisions import POINTS, make_rule
from cxai_jax.inference.predictor import Predictor, chosen_sites, load, over_sites
from cxai_jax.inference.shown_maps import CAM, MAPS, make_maps
from cxai_jax.inference.table import (
    OVERLAY_HEIGHT,
    Answer,
    Prepared,
    Table,
    finish,
    read,
    row,
)
from cxai_jax.mesh import make_mesh
from cxai_jax.report import pictures
from cxai_jax.report.prediction_page import tally_sentence
from cxai_jax.writer import read_json, write_json

NOT_FINITE = (
    "the network's probabilities are not finite; its weights are damaged or its "
    "training diverged, use another run"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see the module."""
    about_this = __doc__.partition("\n\n")[2]
    parser = argparse.ArgumentParser("cxai-predict", epilog=about_this)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="a finished run")
    model.add_argument("--model", help="a bundle: its folder, or a hub id OWNER/NAME")
    parser.add_argument("--images", nargs="+", action="extend", default=[])
    parser.add_argument("more", nargs="*", help="more files, folders or globs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--votes", type=int, help="masks per image; default: config")
    parser.add_argument("--window", type=window, help="CENTER,WIDTH for DICOM files")
    parser.add_argument("--site", default="", help="NAME of the images' site, or each")
    parser.add_argument("--map", default=CAM, help=f"one of {', '.join(MAPS)}")
    parser.add_argument(
        "--operating_point",
        default="",
        help=f"one of {', '.join(POINTS)}, or a threshold such as 0.5",
    )
    parser.add_argument(
        "--keep_ids", action="store_true", help="patient ids as they are, not hashed"
    )
    parser.add_argument("--resume", action="store_true", help="continue in --out")
    given = parser.parse_intermixed_args(arguments)
    host.keep_freed_memory()
    logging.getLogger("jax").setLevel(logging.WARNING)
    for noisy in ("absl", "orbax"):  # What orbax logs as an error it raises as well.
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # What pydicom cannot read becomes an error of ours; importing it resets its level.
    logging.getLogger("pydicom").addHandler(logging.NullHandler())
    logging.getLogger("pydicom").propagate = False
    warnings.filterwarnings("ignore", module="pydicom")
    done = given.out / "predictions.csv"
    if done.exists() and not given.resume:
        parser.error(
            f"{done} exists; add --resume to continue, or choose another --out"
        )
    if given.workdir and given.workdir.is_dir():
        cache = given.workdir.absolute() / "xla_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    found = inputs.find([*given.images, *given.more])
    found = without(found, given.out)
    errors = list(found.errors)
    about = {"model": given.model} if given.model else {"workdir": str(given.workdir)}
    if not found.files and not errors:
        errors.append(("--images", "no files were named; give files, folders or globs"))
    try:
        folder = bundle.locate(given.model) if given.model else given.workdir
        model = bundle.read(folder) if given.model else load(folder)
        known = novelty.load(folder)
        features = novelty.load_features(folder)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if done.exists():  # Its page stays as it is.
            parser.error(str(error))
        given.out.mkdir(parents=True, exist_ok=True)
        errors.append((str(given.model or given.workdir), str(error)))
        counts = tally(found, 0, len(found.errors))
        return conclude(given.out, [], errors, None, about, counts)
    if given.votes is not None:
        cells = (model.config.data.image_size // model.config.tta.patch) ** 2
        if not 0 <= given.votes <= cells:
            parser.error(f"--votes={given.votes} must be 0..{cells}, the image's cells")
        model.config.tta.k = given.votes
    try:
        sites = chosen_sites(model, given.site)
        rule = make_rule(model.results, given.operating_point)
        answer = Answer(model, given.map, rule, features)
        programs = given.workdir and given.workdir / "executables"
        predictor = Predictor(model, make_mesh(), programs)
        draw = make_maps(model, given.map, predictor.batch_size)
    except ValueError as error:
        parser.error(str(error))
    if sites:
        about["sites"] = list(sites)
    about |= {"step": model.step, "tta": model.config.tta.to_dict()}
    about |= {"map": given.map, "decision": answer.rule.text}
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
            parser.error(f"{error}; choose another --out")
        if not same:
            parser.error(
                f"{done} was made with another model, --votes, --site, --window, "
                "--map, --keep_ids or --operating_point; choose another --out"
            )
    write_json(given.out / "about.json", about)
    rows, signal, counts = predict(
        answer, predictor, draw, known, found, errors, rows, given, sites
    )
    about["ignored files"] = found.ignored
    about["rows of patients.csv that name no image"] = found.unmatched
    code = conclude(given.out, rows, errors, answer, about, counts)
    if signal:
        print("stopped; the same command with --resume continues")
    return 128 + signal if signal else code


def window(text: str) -> tuple[float, float]:
    """Centre and width of a text like "-600,1500"."""
    centre, width = map(float, text.split(","))
    if not width > 0:  # NaN too.
        raise ValueError("the width must be positive")
    return centre, width


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
    answer, predictor, draw, known, found, errors, rows, given, sites
) -> tuple[list[dict], int, dict[str, int]]:
    """Predicts the files that have no row yet, as of `sites`; adds to `errors`.

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
                network_input(transforms.as_stored(one.gray)),
                pictures.shrink(one.gray[..., 0], OVERLAY_HEIGHT),
            )
            for one in inputs.open_slices(path, window=given.window, patient=patient)
            if one.name not in done
        ]

    files = [path for path in found.files if reading.printable(path) not in done]
    waiting, begun, number, saved, stopped = [], time.monotonic(), 0, 0, 0
    opened_names, failed, lost = [], len(found.errors), set()
    with host.StopSignal() as stop:
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
                answers = {
                    name: predictor(images, np.full(len(images), site))
                    for name, site in sites.items()
                }
                if sites:
                    outcome = over_sites(list(answers.values()))
                else:
                    outcome = predictor(images)
                finite = np.isfinite(outcome.probs).all(1)
                bad = [batch[i].name for i in np.flatnonzero(~finite)]
                errors += [(name, NOT_FINITE) for name in bad]
                lost.update(bad)
                by_site = {name: answers[name] for name in shown(sites)}
                maps = draw(images, outcome, sites)
                table.add(
                    [
                        row(batch[i], outcome, i, maps[i], answer, out, by_site)
                        for i in np.flatnonzero(finite)
                    ]
                )
                number += len(batch)
                saved += outcome.saved
            if number > before or last:
                rate = number / (time.monotonic() - begun)
                progress(place, len(files), f"{rate:.1f} images/s")
            if stop.asked and (waiting or not last):
                stopped = stop.asked
                break
    table.add([{"file": name, "error": text} for name, text in errors])
    table.close()
    if stopped and sys.stdout.isatty():
        print()  # The bar was left in the middle.
    if saved:
        every = number * model.config.tta.k * max(1, len(sites))
        print(f"early exit saved {saved} of {every} masked forward passes")
    written = {row["file"] for row in table.rows}
    predicted = len(found.files) - len(files)
    predicted += sum(written.issuperset(names) for names in opened_names)
    failed += sum(not lost.isdisjoint(names) for names in opened_names)
    return table.rows, stopped, tally(found, predicted, failed)


def progress(done: int, total: int, text: str) -> None:
    """A bar that overwrites itself on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty() or os.environ.get("CI"):
        print(f"{done}/{total} files, {text}", flush=True)
        return
    bar = "#" * (30 * done // total)
    end = "\n" if done == total else ""
    line = f"[{bar:<30}] {done}/{total} files, {text}"
    line = line[: shutil.get_terminal_size().columns - 1]
    print(f"\r{line}\x1b[K", end=end, flush=True)


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


def command() -> int:
    """`main`, where a full disk or a signal outside the loop ends in one line."""
    try:
        return main()
    except OSError as error:
        if not (told := disk.explain(error)):
            raise
        print(f"error: {told}; --resume continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("stopped; the same command with --resume continues")
        return 128 + (error.args[0] if error.args else signals.SIGINT)


if __name__ == "__main__":
    sys.exit(command())
