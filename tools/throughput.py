"""OPENBLAS_NUM_THREADS=1 python -m tools.throughput --workdir=RUN --images=DIR
[--dicom=200] [--json=FILE]

Images per second of `cxai-predict`, stage by stage and as a whole. The stages run
alone, one image or batch after the other: opening files (PNG files of DIR, and copies
of pydicom's CT_small), the network, all votes, rows with and without their overlay, the
page. The whole command runs with every --overlays and --votes=0, over DIR and over the
DICOM files; `network_share` is the seconds that the network needs alone over those of
the command. CPU seconds stand beside the clock: others on the machine change them less.
NumPy's own threads are off, as the command turns them off.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cxai_jax import host
from cxai_jax.data import inputs, novelty, pipeline, transforms
from cxai_jax.inference import choices, predictor
from cxai_jax.inference.decisions import make_rule
from cxai_jax.inference.shown_maps import make_maps
from cxai_jax.inference.table import OVERLAY_HEIGHT, Answer, Prepared, finish, row
from cxai_jax.mesh import scoring_mesh
from cxai_jax.report import pictures
from tools.benchmark_session import describe, make_session
from tools.benchmark_timing import Load
from tools.startup import phases

BEGINS = {"loading the model": "start", "predicting": "model"}


def timed(images: int, work: Callable, *given) -> tuple[object, dict]:
    """What `work(*given)` returns, and what it took for each of so many images."""
    before, begun = Load(), time.perf_counter()
    result = work(*given)
    seconds, after = time.perf_counter() - begun, Load()
    return result, {
        "images": images,
        "images_per_s": images / seconds,
        "cpu_ms_per_image": 1e3 * (after.own - before.own) / images,
        "foreign_load": before.foreign_until(after),
    }


def with_share(found: dict[str, dict], network: str, names: Sequence[str]) -> dict:
    """`found`, in which each of `names` says now for how much of it the network ran."""
    for name in names:
        share = found[name]["images_per_s"] / found[network]["images_per_s"]
        found[name]["network_share"] = share
    return found


def show(found: dict[str, dict]) -> None:
    """Prints one line for each."""
    for name, one in found.items():
        line = f"{name:28}{one['images_per_s']:8.1f} images/s, CPU "
        line += f"{one['cpu_ms_per_image']:7.2f} ms an image"
        if "network_share" in one:
            line += f", the network {one['network_share']:.0%} of the time"
        print(line)


def prepare(paths: Sequence[Path], known: dict, config) -> list[Prepared]:
    """The slices of files, as predicting.py has them."""
    fit = pipeline.fit_for_scoring(config)
    return [
        Prepared(
            one.name,
            one.patient,
            one.notes + novelty.flags(one.gray, known, config.data.image_size),
            fit(transforms.as_stored(one.gray)),
            pictures.shrink(one.gray[..., 0], OVERLAY_HEIGHT),
        )
        for path in paths
        for one in inputs.open_slices(path)
    ]


def predict(voter: predictor.Predictor, batches) -> list[predictor.Predicted]:
    return [voter(np.stack([one.input for one in batch])) for batch in batches]


def make_rows(batches, outcomes, draw: Callable, answer: Answer, out: Path) -> list:
    """The rows of predicted batches; overlays as the answer says."""
    made = []
    for batch, outcome in zip(batches, outcomes, strict=True):
        maps = draw(None, outcome, {})
        foreign = novelty.foreign(outcome.pooled, answer.features)
        for i, (one, *of_it) in enumerate(zip(batch, maps, foreign, strict=True)):
            made.append(row(one, outcome, i, *of_it, answer, out, {}))
    return made


def stages(workdir: Path, files: list[Path], dicom: list[Path], out: Path) -> dict:
    """Each stage by itself."""
    model, known, found = predictor.load(workdir), novelty.load(workdir), {}
    slices = []
    for name, paths in (("open DICOM", dicom), ("open PNG", files)):
        prepare(paths[:1], known, model.config)  # Imports pydicom.
        if paths:
            given = paths, known, model.config
            slices, found[name] = timed(len(paths), prepare, *given)
    size = model.config.eval.batch_size
    cells = (model.config.data.image_size // model.config.tta.patch) ** 2
    batches = [slices[i : i + size] for i in range(0, len(slices), size)]
    for name, k, some in (("voting", 31, batches[:1]), ("network", 0, batches)):
        model.config.tta.update(k=min(k, cells), early_exit=False)
        voter = predictor.Predictor(model, scoring_mesh(size))
        predict(voter, some[:1])  # Compiles.
        outcomes, found[name] = timed(sum(map(len, some)), predict, voter, some)
    draw = make_maps(model, choices.CAM, size, scoring_mesh(size))
    rule, features = make_rule(model.results, ""), novelty.load_features(workdir)
    (out / "overlays").mkdir(parents=True)
    for name, overlays in (("row", "none"), ("row and overlay", "all")):
        answer = Answer(model, choices.CAM, rule, features, overlays)
        given = batches, outcomes, draw, answer, out
        rows, found[name] = timed(len(slices), make_rows, *given)
    counts = {"found": len(rows), "predicted": len(rows)}
    counts |= dict.fromkeys(("failed", "ignored", "left", "unmatched"), 0)
    about = {"decision": rule.text, "tta": model.config.tta.to_dict()}
    given = out, rows, [], answer, about, counts
    found["page"] = timed(len(rows), finish, *given)[1]
    return found


def command(workdir: Path, images: Path, overlays: str, out: Path) -> list[str]:
    given = ["cxai_jax.predict", f"--workdir={workdir}", "--images", str(images)]
    return [*given, "--votes=0", f"--overlays={overlays}", f"--out={out}"]


def whole(workdir: Path, images: Path, number: int, out: Path, kind: str) -> dict:
    """The command, without its start: what follows the line "predicting".

    Args:
      workdir: a finished run.
      images: folder of so many files.
      number: of files.
      out: for the answers.
      kind: of the files, in the names of the rows.
    """
    found = {}
    for overlays in choices.OVERLAYS:
        given = command(workdir, images, overlays, out / overlays)
        ran = phases(given, {**BEGINS, f"{number}/{number} files": "predicted"})
        taken = ran["phases"]["predicted"]
        found[f"{kind} --overlays={overlays}"] = {
            "images": number,
            "images_per_s": number / taken["s"],
            "cpu_ms_per_image": 1e3 * taken["cpu_s"] / number,
            "machine_busy": ran["machine_busy"],
        }
    return found


def copies(number: int, folder: Path) -> list[Path]:
    """CT_small.dcm so many times."""
    from pydicom.data import get_testdata_file

    folder.mkdir()
    paths = [folder / f"{i}.dcm" for i in range(number)]
    for path in paths:
        shutil.copy(get_testdata_file("CT_small.dcm"), path)
    return paths


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.throughput")
    parser.add_argument("--workdir", type=Path, required=True, help="a finished run")
    parser.add_argument("--images", type=Path, required=True, help="folder of slices")
    parser.add_argument("--dicom", type=int, default=200)
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/predict_path_cpu.json")
    )
    given = parser.parse_args(arguments)
    host.keep_freed_memory()
    host.one_device_a_core()
    try:
        predictor.load(given.workdir)
        files = inputs.find([str(given.images)]).files
        if not files:
            raise ValueError(f"--images={given.images} holds no image")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as scratch:
        folder, found = Path(scratch), {}
        dicom = copies(given.dicom, folder / "dicom") if given.dicom else []
        first = command(given.workdir, files[0], "none", folder / "first")
        phases(first, {})  # Compiles; the programs are kept.
        for kind, images, number in (
            ("PNG", given.images, len(files)),
            ("DICOM", folder / "dicom", len(dicom)),
        ):
            if number:
                out = folder / kind
                found |= whole(given.workdir, images, number, out, kind)
        alone = stages(given.workdir, files, dicom, folder / "stages")
    with_share(found | alone, "network", list(found))
    result = describe(make_session())
    result = {
        name: result[name] for name in ("git", "time", "host", "device", "versions")
    }
    about = json.loads((given.workdir / "config.json").read_text())
    result |= {"network": about["model"]["name"], "pixels": about["data"]["image_size"]}
    result |= {"stages, one thread": alone, "command": found}
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    show({**alone, **found})


if __name__ == "__main__":
    main(sys.argv[1:])
