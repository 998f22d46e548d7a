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
import signal as signals
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from cxai_jax import disk, host
from cxai_jax.data import inputs, novelty, pipeline, transforms
from cxai_jax.inference import bundle
from cxai_jax.inference.predictor import Predictor, chosen_sites, load, over_sites
from cxai_jax.inference.table import OVERLAY_HEIGHT, Prepared, Table, finish, read, row
from cxai_jax.mesh import make_mesh
from cxai_jax.report import figures
from cxai_jax.writer import write_json

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
    ours = given.out.resolve()  # May lie in the folder of the images.
    files = [path for path in found.files if ours not in path.resolve().parents]
    found = found._replace(files=files)
    errors = list(found.errors)
    about = {"model": given.model} if given.model else {"workdir": str(given.workdir)}
    if not found.files and not errors:
        errors.append(("--images", "no files were named; give files, folders or globs"))
    try:
        folder = bundle.locate(given.model) if given.model else given.workdir
        model = bundle.read(folder) if given.model else load(folder)
        known = novelty.load(folder)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if done.exists():  # Its page stays as it is.
            parser.error(str(error))
        given.out.mkdir(parents=True, exist_ok=True)
        errors.append((str(given.model or given.workdir), str(error)))
        return conclude(given.out, [], errors, [], 0, about)
    if given.votes is not None:
        cells = (model.config.data.image_size // model.config.tta.patch) ** 2
        if not 0 <= given.votes <= cells:
            parser.error(f"--votes={given.votes} must be 0..{cells}, the image's cells")
        model.config.tta.k = given.votes
    try:
        sites = chosen_sites(model, given.site)
    except ValueError as error:
        parser.error(str(error))
    if sites:
        about["sites"] = list(sites)
    about |= {"step": model.step, "tta": model.config.tta.to_dict()}
    about = json.loads(json.dumps(about | {"window": given.window}))
    (given.out / "overlays").mkdir(parents=True, exist_ok=True)
    rows = []
    if done.exists():
        made = given.out / "about.json"
        if not made.exists() or json.loads(made.read_text()) != about:
            parser.error(
                f"{done} was made with another model, --votes, --site or --window; "
                "choose another --out"
            )
        rows = read(done)
    write_json(given.out / "about.json", about)
    rows, signal = predict(model, known, found, errors, rows, given, sites)
    about["ignored files"] = found.ignored
    code = conclude(given.out, rows, errors, model.class_names, model.positive, about)
    if signal:
        print("stopped; the same command with --resume continues")
    return 128 + signal if signal else code


def window(text: str) -> tuple[float, float]:
    """Centre and width of a text like "-600,1500"."""
    centre, width = map(float, text.split(","))
    if not width > 0:  # NaN too.
        raise ValueError("the width must be positive")
    return centre, width


def predict(model, known, found, errors, rows, given, sites) -> tuple[list[dict], int]:
    """Predicts the files that have no row yet, as of `sites`; adds to `errors`.

    Returns:
      All rows, and the signal that stopped it or 0.
    """
    size, out = model.config.data.image_size, given.out
    network_input = pipeline.fit_for_scoring(model.config)
    programs = given.workdir and given.workdir / "executables"
    predictor = Predictor(model, make_mesh(), programs)
    done = {row["file"] for row in rows}  # Frames of a file have rows of their own.
    shown = list(sites) if len(sites) > 1 else []  # One site's answer is the answer.
    table = Table(out / "predictions.csv", model.class_names, rows, shown)

    def prepare(path: Path) -> list[Prepared]:
        patient = found.patients.get(path, "")
        return [
            Prepared(
                one.name,
                one.patient,
                novelty.flags(one.gray, known, size),
                network_input(transforms.as_stored(one.gray)),
                figures.shrink(one.gray[..., 0], OVERLAY_HEIGHT),
            )
            for one in inputs.open_slices(path, window=given.window, patient=patient)
            if one.name not in done
        ]

    files = [path for path in found.files if inputs.printable(path) not in done]
    waiting, begun, number, saved, stopped = [], time.monotonic(), 0, 0, 0
    with host.StopSignal() as stop:
        for place, (path, opened) in enumerate(inputs.read_ahead(files, prepare), 1):
            if isinstance(opened, ValueError):
                name = inputs.printable(path)
                errors.append((name, str(opened).removeprefix(f"{name}: ")))
            else:
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
                errors += [(batch[i].name, NOT_FINITE) for i in np.flatnonzero(~finite)]
                by_site = {name: answers[name] for name in shown}
                table.add(
                    [
                        row(batch[i], outcome, i, model, out, by_site)
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
    return table.rows, stopped


def progress(done: int, total: int, text: str) -> None:
    """A bar that overwrites itself on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        print(f"{done}/{total} files, {text}", flush=True)
        return
    bar = "#" * (30 * done // total)
    end = "\n" if done == total else ""
    print(f"\r[{bar:<30}] {done}/{total} files, {text}\x1b[K", end=end, flush=True)


def conclude(out: Path, rows, errors, class_names, positive, about) -> int:
    """Writes the page, prints the errors and returns the exit code."""
    finish(out, rows, errors, class_names, positive, about)
    for name, text in errors:
        print(f"error: {name}: {text}", file=sys.stderr)
    of = f", probabilities are of {class_names[positive]}" if rows else ""
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
