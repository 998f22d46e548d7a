"""Broken images, lists, DICOM and weight files, made from a seed, and what each does.

  python tests/faults/bad_input.py OUT.json

Every case runs in a process of its own, forked from this one, so that a hang, a crash
and the peak memory belong to it alone. What is said of it is one of
  opened     it was read: some damage leaves a valid file
  line       a ValueError or missing file in one line that names the file
  traceback  any other exception, several lines, or no name
  hang       not ended after LIMIT seconds
  crash      the process died
  drop       a file in a folder that is neither read, nor an error, nor ignored by name
"""

import collections
import io
import json
import os
import pickle
import random
import select
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from cxai_jax.data import cxr, folder, inputs, sites
from cxai_jax.models import pretrained

LIMIT = 300.0  # Seconds; far beyond the deadline of an image: no measure of speed.
SEED = 0


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures():
    """Name -> a sound file of every format and mode that is read."""
    random_ = np.random.default_rng(SEED)
    gray = random_.integers(0, 255, (40, 50), np.uint8)
    colour = np.repeat(gray[..., None], 3, 2)
    clear = np.dstack([colour, gray])
    deep = random_.integers(0, 4000, (40, 50), np.uint16)
    made = {
        "gray.png": (gray, "PNG", {}),
        "colour.png": (colour, "PNG", {}),
        "clear.png": (clear, "PNG", {}),
        "deep.png": (deep, "PNG", {}),
        "gray.jpg": (gray, "JPEG", {}),
        "progressive.jpg": (colour, "JPEG", {"progressive": True}),
        "gray.tif": (gray, "TIFF", {}),
        "lzw.tif": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "float.tif": (gray.astype(np.float32), "TIFF", {}),
        "deep.tif": (deep, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "gray.bmp": (gray, "BMP", {}),
        "colour.webp": (colour, "WEBP", {"lossless": True}),
    }
    files = {n: saved(Image.fromarray(a), k, **o) for n, (a, k, o) in made.items()}
    one = Image.fromarray(gray)
    files["palette.png"] = saved(one.convert("P"), "PNG", transparency=3)
    files["bit.png"] = saved(one.convert("1"), "PNG")
    files["one.gif"] = saved(one, "GIF")
    files["cmyk.jpg"] = saved(Image.fromarray(colour).convert("CMYK"), "JPEG")
    return files


def dicom(pixels, syntax=None, **fields):
    import pydicom

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.3"
    data.PatientID, data.Modality = "ann", "CT"
    frames = fields.pop("frames", None)
    if frames:
        data.NumberOfFrames = frames
    shape = pixels.shape[1:] if frames else pixels.shape
    data.Rows, data.Columns = shape[:2]
    data.SamplesPerPixel = shape[2] if len(shape) > 2 else 1
    data.PhotometricInterpretation = "RGB" if len(shape) > 2 else "MONOCHROME2"
    if len(shape) > 2:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    if pixels.dtype.kind == "f":
        data.FloatPixelData = pixels.tobytes()
    else:
        data.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicoms():
    """Name -> a sound DICOM file."""
    import pydicom

    random_ = np.random.default_rng(SEED)
    deep = random_.integers(0, 4000, (20, 24), np.uint16)
    frame = saved(Image.fromarray(deep.astype(np.uint8)), "JPEG")
    return {
        "deep.dcm": dicom(deep),
        "byte.dcm": dicom(deep.astype(np.uint8)),
        "colour.dcm": dicom(np.repeat(deep.astype(np.uint8)[..., None], 3, 2)),
        "frames.dcm": dicom(np.stack([deep] * 3), frames=3),
        "float.dcm": dicom(deep.astype(np.float32)),
        "deflated.dcm": dicom(deep, pydicom.uid.DeflatedExplicitVRLittleEndian),
        "jpeg.dcm": dicom(
            deep.astype(np.uint8),
            pydicom.uid.JPEGBaseline8Bit,
            PixelData=pydicom.encaps.encapsulate([frame]),
        ),
        "window.dcm": dicom(deep, WindowCenter=100, WindowWidth=300, RescaleSlope=2),
    }


FIELDS = {  # Values that a DICOM header may claim.
    "Rows": (0, 1, 19, 65_535),
    "Columns": (0, 7, 65_535),
    "NumberOfFrames": (0, 2, 10**7),
    "SamplesPerPixel": (0, 2, 3, 4, 255),
    "BitsAllocated": (0, 1, 7, 12, 32, 64),
    "BitsStored": (0, 3, 17, 64, 65_535),
    "PixelRepresentation": (1, 9),
    "PhotometricInterpretation": ("YBR_FULL", "PALETTE COLOR", "x", ""),
    "PlanarConfiguration": (1, 5),
    "RescaleSlope": ("0", "nan", "inf", "1e308", "-3"),
    "RescaleIntercept": ("nan", "-1e308"),
    "WindowCenter": ("nan", "1e308"),
    "WindowWidth": ("0", "-1", "inf"),
    "PatientID": ("=cmd|' /C calc'!A0", "\x00\n\x1b[2J", "x" * 70_000),
}


def damaged(data: bytes, dice: random.Random) -> bytes:
    """One of six damages: cut, flipped, blanked, repeated, filled or swollen."""
    data, n = bytearray(data), len(data)
    place, size = dice.randrange(n), dice.randint(1, 40)
    kind = dice.randrange(6)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        for _ in range(dice.randint(1, 12)):
            data[dice.randrange(n)] ^= 1 << dice.randrange(8)
    elif kind == 2:
        data[place : place + size] = bytes(min(size, n - place))
    elif kind == 3:
        data[place:place] = data[place : place + size]
    elif kind == 4:
        start = dice.randrange(min(n, 200))
        data[start : start + 4] = b"\xff\xff\xff\x7f"
    else:
        data[place:place] = dice.randbytes(size)
    return bytes(data)


def large():
    """Name -> a small file of a large image: at the bound, and beyond it."""
    import pydicom

    def png(width, height, depth, colour):
        packer = zlib.compressobj(9)
        row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour] * depth // 8)
        body = b"".join(
            [packer.compress(row) for _ in range(height)] + [packer.flush()]
        )
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        chunks = (b"IHDR" + header, b"IDAT" + body, b"IEND")
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
            for c in chunks
        )

    flat = Image.new("L", (7000, 7000))
    deflated = pydicom.uid.DeflatedExplicitVRLittleEndian
    deep = np.zeros((9_900, 9_900), np.uint16)
    return {
        "deep_100.png": png(10_000, 9_990, 16, 0),
        "clear_100.png": png(10_000, 9_990, 8, 6),
        "colour_100.png": png(10_000, 9_990, 8, 2),
        "beyond.png": png(12_000, 12_000, 8, 0),
        "bomb.png": png(20_000, 20_000, 1, 0),
        "long.png": png(70_000, 1, 8, 0),
        "progressive_49.jpg": saved(flat.convert("RGB"), "JPEG", progressive=True),
        "49.webp": saved(flat.convert("RGB"), "WEBP", lossless=True, method=0),
        "49.tif": saved(flat.convert("F"), "TIFF", compression="tiff_adobe_deflate"),
        "49.gif": saved(flat, "GIF"),
        "deep_98.dcm": dicom(deep, deflated),
        "twice.dcm": dicom(np.concatenate([deep] * 2), deflated),
        "colour_33.dcm": dicom(np.zeros((5_700, 5_800, 3), np.uint8), deflated),
    }


def write_large(place: Path) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, a=np.zeros(300_000_000, np.float64))  # 2.4 GB.
    (place.parent / "bomb.npz").write_bytes(packed.getvalue())
    for name, data in large().items():
        (place / name).write_bytes(data)


def lists():
    """Kind -> (file name, sound content)."""
    names = [f"{c}/{i}.png" for c in ("healthy", "sick") for i in range(4)]
    halves = ["train", "test"] * 4
    wang = [f"{i} x/Covid ({i}).png COVID-19" for i in range(1, 4)]
    wang += [f"{i} x/Non-Covid ({i}).png normal" for i in range(1, 4)]
    cells = ["filename,patientid,finding,lung_mask"]
    cells += [f"{i}.png,p{i},{'COVID-19' if i % 2 else 'x'},{i}.png" for i in range(4)]
    return {
        "splits": (
            "splits.csv",
            ["file,split"] + [f"{n},{h}" for n, h in zip(names, halves, strict=True)],
        ),
        "patients": ("patients.csv", ["file,patient"] + [f"{n},p" for n in names]),
        "wang": ("train_list.txt", wang),
        "metadata": ("metadata.csv", cells),
    }


def broken_list(lines, dice):
    """Bytes of a list with one damage a list of lines can have, or a byte's."""
    lines = list(lines)
    row = dice.randrange(len(lines))
    made = [
        lambda: lines[:row],
        lambda: lines + [lines[row]],
        lambda: [lines[0].replace("file", "name")] + lines[1:],
        lambda: lines[:row] + ["../../etc/passwd,x,y,z"] + lines[row:],
        lambda: lines[:row] + ["/dev/zero,x,COVID-19,"] + lines[row:],
        lambda: lines[:row] + ["x" * 200_000 + ",train"] + lines[row:],
        lambda: lines[:row] + ['"' + lines[row]] + lines[row:],
        lambda: lines[:row] + ["\x00"] + lines[row + 1 :],
        lambda: lines[:row] + ["a" * 300 + ".png,train,COVID-19,a"] + lines[row:],
    ]
    pick = dice.randrange(len(made) + 3)
    if pick < len(made):
        return "\n".join(made[pick]()).encode()
    text = "\n".join(lines).encode()
    if pick == len(made):
        return text.decode().encode("utf-16")
    return damaged(text, dice) + (b"\xff" if pick == len(made) + 1 else b"")


def torch_zip():
    """A checkpoint of one tensor, assembled from opcodes: torch is not needed."""
    text = b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01"
    text += b"ctorch._utils\n_rebuild_tensor_v2\nq\x02("
    text += b"(X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04"
    text += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K\x02K\x03\x86"
    text += b"K\x03K\x01\x86\x89NtRs."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("w/data.pkl", text)
        archive.writestr("w/data/0", np.arange(6, dtype=np.float32).tobytes())
    return buffer.getvalue()


def weights():
    """Name -> a sound file of weights, and some that are hostile."""
    small = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    buffer = io.BytesIO()
    np.savez(buffer, **small)
    head = json.dumps({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}})
    safe = struct.pack("<Q", len(head)) + head.encode() + small["a"].tobytes()
    run = pickle.dumps(collections.Counter)  # Any class that is not a tensor's.
    hash_ = b"\x80\x02})q\x00"
    for i in range(60):
        hash_ += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    hostile = {"hash": hash_ + b"K\x01s.", "memo": b"\x80\x02}r\xff\xff\xff\x7f."}
    hostile["class"] = run
    files = {"w.npz": buffer.getvalue(), "w.safetensors": safe, "w.pth": torch_zip()}
    bad = {}
    for name, text in hostile.items():
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, "w") as archive:
            archive.writestr("w/data.pkl", text)
        bad[f"{name}.pth"] = zipped.getvalue()
    return files, bad


def open_image(path):
    return inputs.open_slices(Path(path))


def find(path):
    found = inputs.find([str(path)])
    named = {os.path.basename(p) for p in found.files}
    named |= {os.path.basename(p) for p, _ in found.errors}
    named |= {os.path.basename(p) for p in found.ignored}
    for name in os.listdir(path):
        place = Path(path, name)
        searched = place.is_dir() and not place.is_symlink()
        if name not in named and name != "patients.csv" and not searched:
            return f"drop: {name}"
    for error in found.errors:
        if not error[1] or "\n" in error[1]:
            return f"traceback: {error}"
    return None


def cases(root: Path):
    """(group, name, function, path) of every case; writes its files under `root`."""
    dice = random.Random(SEED)
    for group, sound, count in (("image", pictures(), 15), ("dicom", dicoms(), 16)):
        for name, data in sound.items():
            for i in range(count):
                path = root / f"{i}_{name}"
                path.write_bytes(damaged(data, dice) if i else data)
                yield group, path.name, open_image, path
    deep = np.arange(480, dtype=np.uint16).reshape(20, 24)
    for name, values in FIELDS.items():
        for i, value in enumerate(values):
            try:
                data = dicom(deep, **{name: value})
            except Exception:
                continue  # pydicom does not write everything that it reads.
            path = root / f"field_{name}_{i}"
            path.write_bytes(data)
            yield "dicom", path.name, open_image, path
    # Made in a process of its own, so that its memory is not taken for a reader's.
    folder_ = root / "large"
    folder_.mkdir()
    run(write_large, folder_, limit=None)
    for path in sorted(folder_.iterdir()):
        yield "large", path.name, open_image, path
    nan = np.ones((4, 4), np.float32)
    nan[0] = np.nan
    Image.fromarray(nan).save(root / "nan.tif")
    Image.new("RGB", (8, 8)).save(root / "eps.png", "EPS")
    (root / "empty.png").touch()
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "fifo.png")
    for name in ("nan.tif", "eps.png", "empty.png", "loop.png", "fifo.png"):
        yield "special", name, open_image, root / name
    yield "special", "zero.png", open_image, "/dev/zero"
    yield from folders(root)
    yield from listings(root, dice)
    bomb = root / "bomb.npz"
    yield "weights", bomb.name, pretrained.read_tensors, str(bomb)
    sound, hostile = weights()
    for name, data in (*sound.items(), *hostile.items()):
        for i in range(22 if name in sound else 1):
            path = root / f"{i}_{name}"
            path.write_bytes(damaged(data, dice) if i else data)
            yield "weights", path.name, pretrained.read_tensors, str(path)


def folders(root: Path):
    picture = pictures()["gray.png"]

    def tree(name):
        place = root / "trees" / name
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(picture)
        return place

    place = tree("links")
    (place / "linked").symlink_to(root / "trees")
    (place / "loop.png").symlink_to("loop.png")
    (place / "gone.png").symlink_to("nowhere")
    yield "folder", "links", find, place
    place = tree("special")
    os.mkfifo(place / "fifo.png")
    os.mkfifo(place / "fifo")
    yield "folder", "special", find, place
    place = inner = tree("deep")
    before = os.getcwd()
    os.chdir(inner)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(before)
    yield "folder", "deep", find, place
    for i, text in enumerate((b"\xff", b"file\n", b"file,patient\n" + b"x" * 200_000)):
        place = tree(f"patients{i}")
        (place / "patients.csv").write_bytes(text)
        yield "folder", place.name, find, place
    place = tree("fifo_patients")
    os.mkfifo(place / "patients.csv")
    yield "folder", place.name, find, place


def listings(root: Path, dice):
    picture = pictures()["gray.png"]
    for kind, (name, lines) in lists().items():
        for i in range(24):
            place = root / "lists" / f"{kind}{i}"
            inside = {
                "wang": [f"COVID/Covid ({i}).png" for i in range(1, 4)]
                + [f"non-COVID/Non-Covid ({i}).png" for i in range(1, 4)],
                "metadata": [f"{d}/{i}.png" for i in range(4) for d in MASKS],
            }.get(kind, [f"{c}/{i}.png" for c in ("healthy", "sick") for i in range(4)])
            for file in inside:
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                (place / file).write_bytes(picture)
            table = place / name
            table.write_bytes(broken_list(lines, dice))
            plan = {
                "wang": lambda p: sites.plan_site_a(p.parent, split_files=[p]),
                "metadata": lambda p: cxr.plan_cxr(p.parent),
            }.get(kind, lambda p: folder.plan_folder(p.parent))
            yield kind, f"{kind}{i}", plan, table


MASKS = ("images", "lung_masks")


def outcome(function, path) -> str:
    try:
        said = function(path)
        return said if isinstance(said, str) else "opened"
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        # The lists name the folder of an image, or the table itself.
        named = Path(path).name in text or str(Path(path).parent) in text
        if "\n" in text or not named:
            return f"traceback: {type(error).__name__}: {text:.200}"
        return f"line: {text:.300}"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {str(error):.200}"


def run(function, path, limit: float | None = LIMIT) -> dict:
    """Forks, and watches: what was said, seconds, and bytes that were taken."""
    read, write = os.pipe()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.write(write, outcome(function, path).encode("utf-8", "replace")[:2000])
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], limit)
    said = os.read(read, 4000).decode() if ready else "hang"
    os.close(read)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, _, usage = os.wait4(child, 0)
    return {
        "said": said or "crash",
        "seconds": round(time.monotonic() - begun, 3),
        "peak": max(0, usage.ru_maxrss * 1024 - before),
    }


def main(out: str) -> None:
    """Runs every case; writes rows and counts as JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("gray.png", "deep.dcm"):  # Imports what opening needs.
            path = Path(scratch, f"warm_{name}")
            path.write_bytes({**pictures(), **dicoms()}[name])
            inputs.open_slices(path)
        for group, name, function, path in cases(Path(scratch)):
            rows.append({"group": group, "name": name, **run(function, path)})
        sys.setrecursionlimit(10_000)  # To remove the deep tree.
    kinds = [row["said"].split(":")[0] for row in rows]
    groups = [row["group"] for row in rows]
    table = {g: {} for g in dict.fromkeys(groups)}
    for group, kind in zip(groups, kinds, strict=True):
        table[group][kind] = table[group].get(kind, 0) + 1
    result = {
        "cases": len(rows),
        "counts": dict(collections.Counter(kinds)),
        "by group": table,
        "largest peak, bytes": max(row["peak"] for row in rows),
        "longest, seconds": max(row["seconds"] for row in rows),
        "rows": rows,
    }
    Path(out).write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
