"""python -m experiments.covidx_scale [--slices=100000] [--side=256]

What a data set of the size of COVIDx-CT costs: made slices in its layout are prepared,
opened as a run opens them, and read through the host path for one epoch. Every stage is
a process of its own; wall and CPU seconds (of all threads), peak memory and disk go to
results/covidx_scale.json, under the number of slices and the stored side.

The slices are smooth noise, stored at the side they have; of the patients, 40 slices
each, three quarters train, an eighth val, an eighth test. Every class of a split has
DISTINCT pictures of its own, further names are hard links to them: each is opened,
hashed, stored and compared like any other, but making them takes no time. A real slice
has 512 x 512 pixels, of which 256 x 256 are stored: opening one takes longer than here.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from configs import covidx_ct as config_file
from cxai_jax import data, mesh
from cxai_jax.data import covidx_ct, identity, pipeline, store
from cxai_jax.training.results import versions
from cxai_jax.writer import write_json

OUT = Path(__file__).parent / "results" / "covidx_scale.json"
PATIENT_SLICES = 40
SHARES = {"train": 0.75, "val": 0.125, "test": 0.125}
DISTINCT = 200
BATCH = 64
CELLS = 12  # A side: what a made slice shows.
PREFIX = ("Normal", "CP", "NCP")  # Of a patient, by class.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=256, help="pixels, as stored")
    parser.add_argument("--read", type=int, help="images read by the epoch; all")
    parser.add_argument("--folder", type=Path, help="for the data; a temporary one")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(measured(STAGES[options.stage], options)))
        return
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    found = results[f"{options.slices} slices, {options.side} px"] = {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, shared with others",
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for stage in STAGES:
            found[stage] = in_a_process(stage, options, folder)
            print(stage, found[stage], flush=True)
            write_json(options.out, results)


def in_a_process(stage: str, options, folder: str) -> dict:
    """What `measured` says of a stage."""
    command = [sys.executable, "-m", "experiments.covidx_scale", f"--stage={stage}"]
    command += [f"--slices={options.slices}", f"--side={options.side}"]
    command += [f"--folder={folder}"] + [f"--read={options.read}"] * bool(options.read)
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def measured(stage, options) -> dict:
    """A stage's own words, its seconds, and the peak memory of this process."""
    begun, used = time.monotonic(), time.process_time()
    found = stage(options)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return found | {
        "wall_s": round(time.monotonic() - begun, 1),
        "cpu_s": round(time.process_time() - used, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def make(options) -> dict:
    """Writes lists, metadata.csv and images."""
    source, random = options.folder / "source", np.random.default_rng(0)
    (source / "images").mkdir(parents=True)
    lists, patients, drawn = {split: [] for split in SHARES}, [], {}
    ends = np.cumsum(list(SHARES.values())) * options.slices / PATIENT_SLICES
    for i in range(options.slices):
        number, slice_ = divmod(i, PATIENT_SLICES)
        label = number % 3
        if slice_ == 0:
            patients.append(f"{PREFIX[label]}_{number}")
        name = f"{patients[-1]}_{number}_{slice_:04d}.png"
        split = list(SHARES)[int(np.searchsorted(ends, number + 0.5))]
        pictures = drawn.setdefault((split, label), [])
        if len(pictures) < DISTINCT:
            picture(random, options.side).save(source / "images" / name)
            pictures.append(name)
        else:
            other = source / "images" / pictures[i % DISTINCT]
            os.link(other, source / "images" / name)
        lists[split].append(f"{name} {label} 0 0 {options.side} {options.side}\n")
    for split, lines in lists.items():
        listing = source / f"{split}_COVIDx_CT-2A.txt"
        listing.write_text("".join(lines))
    rows = "".join(f"{patient},made\n" for patient in patients)
    (source / "metadata.csv").write_text(f"patient id,source\n{rows}")
    return {"disk_mb": megabytes(source)}


def picture(random: np.random.Generator, side: int) -> Image.Image:
    """A made slice: `side` x `side` pixels, gray."""
    cells = random.integers(0, 256, (CELLS, CELLS), np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.BILINEAR)


def prepare(options) -> dict:
    """Reads the lists, stores all images, examines them for leakage."""
    begun = time.monotonic()
    plan = covidx_ct.plan_covidx_ct(options.folder / "source")
    planned = time.monotonic() - begun
    summary = store.build(plan, options.folder / "data", side=options.side)
    return {
        "plan_wall_s": round(planned, 1),
        "images": sum(sum(of.values()) for of in summary["counts"].values()),
        "leakage": summary["leakage"]["verdict"],
        "disk_mb": megabytes(options.folder / "data"),
    }


def start(options) -> dict:
    """What a run does with the data before its first step, where they stay on disk."""
    config = make_config(options)
    begun = time.monotonic()
    dataset = data.load(config.data)
    opened = time.monotonic() - begun
    identity.identity(dataset)
    first_batches(config, dataset.splits["train"])
    return {"load_wall_s": round(opened, 1)}


def read(options) -> dict:
    """The epoch's images through the host path, and nothing else."""
    config = make_config(options)
    records = data.load(config.data).splits["train"]
    begun, used = time.monotonic(), time.process_time()
    batches, steps = first_batches(config, records)
    steps = min(steps, (options.read or len(records)) // BATCH)
    for _ in range(steps - 1):
        next(batches)
    images, wall = steps * BATCH, time.monotonic() - begun
    return {
        "images": images,
        "images_per_s": round(images / wall),
        "images_per_cpu_s": round(images / (time.process_time() - used)),
    }


def make_config(options):
    """The config of Table 3 with the data on the host."""
    config = config_file.get_config("baseline")
    config.data.data_dir = str(options.folder / "data")
    config.data.residency = "host"
    config.data.resize = options.side
    return config


def first_batches(config, records):
    """(the batches after the first one, steps of an epoch), as `compile.feed` reads."""
    fit = pipeline.fit_for_training(config)
    rows = pipeline.training_rows(records, config.data.site_repeats, BATCH)
    stream = pipeline.row_stream(rows, BATCH, config.seed)
    canvas, split = pipeline.decode_all(records, fit, 0.0)
    assert split is None, "nothing fits into no bytes"
    where = mesh.make_mesh()
    batches = pipeline.host_batches(records, stream, 0, fit, canvas, False, where)
    next(batches)
    return batches, len(rows) // BATCH


def megabytes(folder: Path) -> int:
    """What the files in a folder hold, every hard link counted."""
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6)


STAGES = {"make": make, "prepare": prepare, "start": start, "read": read}

if __name__ == "__main__":
    main()
