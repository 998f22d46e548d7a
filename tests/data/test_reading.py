"""Files that hang, unfold or are none: one error names them, the rest is read."""

import io
import os
import signal
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from cxai_jax.data import inputs, levels, reading, store, transforms
from cxai_jax.data.plan import Plan, Source


@pytest.fixture(autouse=True)
def alarm():
    """A test that hangs fails instead."""

    def ring(*_):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def png_of(width, height, depth=8, colour=0):
    """A PNG of zeros, small whatever its size."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    packer = zlib.compressobj(9)
    row = bytes(1 + width * channels * depth // 8)
    body = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + body, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in chunks
    )


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path in (tmp_path / "x.png", "/dev/zero", tmp_path):
        for read in (reading.read_bytes, inputs_open, transforms.open_gray):
            with pytest.raises(ValueError, match="not a regular file") as caught:
                read(path)
            assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="loop.png: cannot be opened .Too many"):
        inputs_open(tmp_path / "loop.png")
    with pytest.raises(ValueError, match="not a regular file"):
        reading.read_text(tmp_path / "x.png")


def inputs_open(path):
    return inputs.open_slices(reading.Path(path))


def test_a_file_larger_than_allowed_is_not_read(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(reading.MAX_BYTES + 1)  # Takes no room on disk.
    with pytest.raises(ValueError, match="huge.png: opening it takes about 1.0 GB"):
        inputs.open_slices(path)
    with pytest.raises(ValueError, match="5 bytes, at most 4 are read"):
        path.write_bytes(b"12345")
        reading.read_bytes(path, most=4)


def test_what_is_not_opened_in_time_is_given_up(monkeypatch):
    monkeypatch.setattr(reading, "DEADLINE", 0.3)
    never = threading.Event()

    def read(i):
        if i in (1, 5):
            never.wait(30)
        return i

    begun = time.monotonic()
    found = list(reading.read_ahead(range(40), read))
    assert time.monotonic() - begun < 10
    never.set()
    assert [item for item, _ in found] == list(range(40))
    for i, result in found:
        if i in (1, 5):
            assert str(result) == "not opened within 0.3 s; given up"
        else:
            assert result == i


def test_every_slot_may_hang_and_the_others_are_read(monkeypatch):
    monkeypatch.setattr(reading, "DEADLINE", 0.2)
    never, many = threading.Event(), 2 * reading.READERS
    found = list(
        reading.read_ahead(range(many + 3), lambda i: i < many and never.wait(30))
    )
    never.set()
    assert [str(result)[:10] for _, result in found[:many]] == ["not opened"] * many
    assert [result for _, result in found[many:]] == [False] * 3


def test_any_exception_is_the_error_of_its_item():
    def read(error):
        raise error

    errors = [TypeError("a"), MemoryError(), RecursionError("b"), ValueError("c")]
    found = [str(result) for _, result in reading.read_ahead(errors, read)]
    assert found == [
        "TypeError: a",
        "there is not enough memory to open it",
        "RecursionError: b",
        "c",
    ]


def test_large_images_take_turns():
    inside, most = [], []

    def read(_):
        with reading.turn(reading.SMALL + 1), reading.turn(reading.MAX_BYTES):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    assert all(result is None for _, result in reading.read_ahead(range(8), read))
    assert max(most) == 1
    with pytest.raises(ValueError, match="about 1.5 GB of memory, at most 1 GB"):
        reading.turn(1_500_000_000)


def test_a_large_image_that_hangs_does_not_hang_the_others(monkeypatch):
    monkeypatch.setattr(reading, "DEADLINE", 0.3)
    never = threading.Event()

    def read(i):
        if i == 2:  # Small, read all the same.
            return i
        with reading.turn(reading.SMALL + 1):
            never.wait(30)

    first, second, third = [result for _, result in reading.read_ahead(range(3), read)]
    never.set()
    assert third == 2
    texts = {str(first)[:20], str(second)[:20]}
    assert texts == {"not opened within 0.", "a large image that w"}


def test_declared_sizes_are_checked_before_decoding(tmp_path):
    path = tmp_path / "x.png"
    whole = png_of(8, 8)
    for width, height in ((12_000, 9_000), (70_000, 2), (60_000, 60_000)):
        header = struct.pack(">II", width, height)
        chunk = whole[12:16] + header + whole[24:29]
        crc = struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(whole[:12] + chunk + crc + whole[33:])
        with pytest.raises(ValueError, match="x.png: .*(megapixels|exceeds limit)"):
            inputs.open_slices(path)


def test_large_images_of_16_bits_and_with_transparency_are_opened(tmp_path):
    deep, clear = tmp_path / "deep.png", tmp_path / "clear.png"
    deep.write_bytes(png_of(3000, 1000, depth=16))
    clear.write_bytes(png_of(3000, 1000, colour=6))
    for path in (deep, clear):
        (only,) = inputs.open_slices(path)
        assert only.gray.shape == (1000, 3000, 1) and not only.gray.any()


def test_strips_give_what_the_whole_image_gives(monkeypatch):
    random = np.random.default_rng(0)
    pictures = {
        "I;16": random.integers(0, 4000, (50, 40), np.uint16),
        "F": random.normal(0, 1, (50, 40)).astype(np.float32),
        "RGBA": random.integers(0, 255, (50, 40, 4), np.uint8),
        "RGB": random.integers(0, 255, (50, 40, 3), np.uint8),
    }
    for kind, pixels in pictures.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF")
        found = []
        for strip in (1, 90, 1 << 20):
            monkeypatch.setattr(levels, "STRIP", strip)
            found += transforms.decode_frames(buffer.getvalue(), "x")
        np.testing.assert_array_equal(found[0], found[2], err_msg=kind)
        np.testing.assert_array_equal(found[1], found[2], err_msg=kind)
    values = pictures["F"].astype(np.float64)
    expected = 255 * (values - values.min()) / np.ptp(values)
    buffer = io.BytesIO()
    Image.fromarray(pictures["F"]).save(buffer, "TIFF")
    (got,) = transforms.decode_frames(buffer.getvalue(), "x")
    np.testing.assert_array_equal(got, np.round(expected).astype(np.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_an_error(tmp_path, bad):
    pixels = np.ones((4, 5), np.float32)
    pixels[1, 2] = bad
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match="x.tif: .*1 pixels are not finite"):
        inputs.open_slices(path)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "TGA", "PCX", "ICO"])
def test_other_formats_of_pillow_are_not_opened(tmp_path, kind):
    path = tmp_path / "x.png"
    Image.new("RGB", (16, 16)).save(path, kind)
    with pytest.raises(ValueError, match="not an image in a known format"):
        inputs.open_slices(path)


def test_the_first_picture_of_a_gif_is_read_and_said_so(tmp_path):
    path = tmp_path / "x.gif"
    pictures = [Image.new("L", (6, 4), level) for level in (9, 200)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    (only,) = inputs.open_slices(path)
    assert only.gray.max() == 9 and only.notes == ["first frame of several"]
    pictures[1].save(path)
    (only,) = inputs.open_slices(path)
    assert only.gray.min() == 200 and only.notes == []
    pictures[1].save(tmp_path / "x.webp", lossless=True)
    (only,) = inputs.open_slices(tmp_path / "x.webp")
    assert only.gray.min() == 200


def dicom(path, pixels=None, syntax=None, **fields):
    """Writes a DICOM file of uint16 pixels [H, W]."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    plain = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.TransferSyntaxUID = syntax or plain
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.3"
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4) if pixels is None else pixels
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_a_deflated_dicom_is_measured_before_it_is_inflated(tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    deflated = pydicom.uid.DeflatedExplicitVRLittleEndian
    path = dicom(tmp_path / "x", np.zeros((2000, 1000), np.uint16), deflated)
    assert path.stat().st_size < 20_000
    assert inputs.open_slices(path)[0].gray.shape == (2000, 1000, 1)
    monkeypatch.setattr(reading, "MAX_BYTES", 2_000_000)
    with pytest.raises(ValueError, match="x: it inflates to more than 0.002 GB"):
        inputs.open_slices(path)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"Rows": 20_000, "Columns": 20_000}, "at most 100 megapixels"),
        ({"NumberOfFrames": 10**8}, "at most 100 megapixels"),
        ({"RescaleSlope": "nan", "RescaleIntercept": 0}, "12 pixels are not finite"),
        ({"WindowCenter": "nan", "WindowWidth": 4}, "its window, centre nan"),
        ({"WindowCenter": 3, "WindowWidth": -4}, "width -4, is none"),
    ],
)
def test_dicom_that_declares_what_cannot_be(tmp_path, fields, message):
    path = dicom(tmp_path / "x", **fields)
    with pytest.raises(ValueError, match=message) as caught:
        inputs.open_slices(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("allocated", [1, 8, 12, 32, 64])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_dicom_whose_bits_disagree_is_one_error(tmp_path, allocated, samples):
    for stored in (0, 7, 16, 40):
        path = dicom(
            tmp_path / "x",
            BitsAllocated=allocated,
            BitsStored=stored,
            SamplesPerPixel=samples,
            PlanarConfiguration=0,
            PhotometricInterpretation="RGB" if samples > 1 else "MONOCHROME2",
        )
        try:
            inputs.open_slices(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")


def test_colour_data_sets_are_read_as_carefully(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "large.png").write_bytes(png_of(60_000, 2_000, colour=2))
    plan = Plan(
        name="tints",
        split="given",
        split_scheme="given",
        class_names=("x",),
        site_names=("s",),
        positive=0,
        sources=[
            Source(file, file.name, 0, "train")
            for file in sorted(tmp_path.glob("*.png"))
        ],
    )
    with pytest.raises(ValueError, match="fifo.png: not a regular file .*--skip_bad"):
        store.build(plan, tmp_path / "data", channels=3, side=None)
    summary = store.build(plan, tmp_path / "data", True, channels=3, side=None)
    (fifo, _), (large, reason) = summary["skipped"]
    assert (fifo, large) == ("fifo.png", "large.png")
    assert "60000 x 2000 pixels, at most 100 megapixels" in reason
    records = store.load("tints", "given", tmp_path / "data").splits["train"]
    np.testing.assert_array_equal(records.images[0], pixels)
    gray = np.repeat(pixels[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(records.images[1], gray)


def test_reading_ahead_keeps_order_and_errors():
    def read(i):
        if i == 3:
            raise ValueError("three")
        return [i]

    got = list(reading.read_ahead(range(100), read))
    assert [item for item, _ in got] == list(range(100))
    assert isinstance(got[3][1], ValueError) and got[50][1] == [50]
