"""Opening odd image files, and resizing."""

import io
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cxai_jax.data import augment, transforms

RAMP = np.linspace(0, 255, 12 * 10).round().astype(np.uint8).reshape(12, 10)


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "name,make",
    [
        ("gray.png", lambda: Image.fromarray(RAMP)),
        ("rgb.png", lambda: Image.fromarray(RAMP).convert("RGB")),
        ("rgba.png", lambda: Image.fromarray(RAMP).convert("RGBA")),
        ("la.png", lambda: Image.fromarray(RAMP).convert("LA")),
        ("gray.bmp", lambda: Image.fromarray(RAMP)),
        ("sixteen.png", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("sixteen.tif", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("float.tif", lambda: Image.fromarray(RAMP.astype(np.float32) / 100 - 1)),
        ("integer.tif", lambda: Image.fromarray(RAMP.astype(np.int32) - 100)),
        ("100% größe.png", lambda: Image.fromarray(RAMP)),
    ],
)
def test_every_lossless_kind_gives_the_same_gray(tmp_path, name, make):
    gray = transforms.open_gray(save(tmp_path / name, make()))
    assert gray.shape == (12, 10, 1) and gray.dtype == np.uint8
    np.testing.assert_array_equal(gray[..., 0], RAMP)


def test_palette_colours_are_looked_up(tmp_path):
    image = Image.fromarray(RAMP % 2)
    image.putpalette([10, 10, 10, 200, 200, 200])
    gray = transforms.open_gray(save(tmp_path / "palette.png", image))
    np.testing.assert_array_equal(gray[..., 0], np.where(RAMP % 2, 200, 10))


def test_transparent_palette_entry_is_black(tmp_path):
    image = Image.fromarray(RAMP % 2)
    image.putpalette([90, 90, 90, 200, 200, 200])
    path = save(tmp_path / "palette.png", image, transparency=0)
    np.testing.assert_array_equal(
        transforms.open_gray(path)[..., 0], np.where(RAMP % 2, 200, 0)
    )


def test_transparency_is_laid_over_black(tmp_path):
    rgba = np.full((4, 4, 4), 255, np.uint8)
    rgba[:2, :, 3] = 0
    gray = transforms.open_gray(save(tmp_path / "a.png", Image.fromarray(rgba)))
    assert (gray[:2] == 0).all() and (gray[2:] == 255).all()


def test_jpeg_named_png_and_cmyk_are_read(tmp_path):
    for name, mode in (("gray.png", "L"), ("cmyk.jpg", "CMYK")):
        flat = Image.fromarray(np.full((16, 16), 120, np.uint8)).convert(mode)
        gray = transforms.open_gray(save(tmp_path / name, flat, format="JPEG"))
        assert gray.shape == (16, 16, 1)
        assert abs(gray.astype(int) - 120).max() <= 3


def test_twelve_bits_in_sixteen_use_the_full_range(tmp_path):
    values = np.array([[0, 2048, 4095]], np.uint16)
    gray = transforms.open_gray(save(tmp_path / "ct.png", Image.fromarray(values)))
    np.testing.assert_array_equal(gray[0, :, 0], [0, 128, 255])


def test_one_pixel_and_constant_images_are_fine(tmp_path):
    path = save(tmp_path / "dot.png", Image.fromarray(np.array([[7]], np.uint8)))
    dot = transforms.open_gray(path)
    assert transforms.short_side(dot, 16).shape == (16, 16, 1)
    assert (transforms.squash(dot, 8) == 7).all()
    constant = Image.fromarray(np.full((3, 3), 2.5, np.float32))
    assert (transforms.open_gray(save(tmp_path / "c.tif", constant)) == 0).all()


def png_bytes():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data,reason",
    [
        (b"", "is empty"),
        (b"not an image at all", "not an image in a known format"),
        (png_bytes()[:1500], "cannot be read as an image"),
        (zlib.compress(b"x" * 100), "not an image in a known format"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, data, reason):
    path = tmp_path / "bad file.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad file.png.*{reason}") as error:
        transforms.open_gray(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_stacks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.png"):
        transforms.open_gray(tmp_path / "absent.png")
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    frames[0].save(tmp_path / "s.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="2 frames; save one file per slice"):
        transforms.open_gray(tmp_path / "s.tif")


def test_camera_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotate by 90 degrees to view.
    path = save(tmp_path / "r.png", Image.fromarray(RAMP), exif=exif)
    np.testing.assert_array_equal(
        transforms.open_gray(path)[..., 0], np.rot90(RAMP, -1)
    )


@pytest.mark.parametrize(
    "shape,expected",
    [
        ((100, 50), (64, 32)),
        ((30, 45), (32, 48)),
        ((10, 50), (32, 64)),  # 5:1 is squashed to 2:1.
        ((1, 1), (32, 32)),
    ],
)
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_short_side_keeps_the_aspect_up_to_two(shape, expected, channels):
    image = np.zeros(shape + channels, np.uint8)
    assert transforms.short_side(image, 32).shape == expected + channels


def test_resizing_agrees_with_a_float64_triangle_filter():
    image = np.random.default_rng(1).integers(0, 255, (40, 40, 1), np.uint8)

    def weights(out, size):
        scale = size / out
        centre = (np.arange(out) + 0.5) * scale
        distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / max(scale, 1)
        w = np.maximum(0, 1 - distance)
        return w / w.sum(1, keepdims=True)

    w = weights(16, 40)
    expected = w @ image[..., 0].astype(np.float64) @ w.T
    np.testing.assert_allclose(
        transforms.squash(image, 16)[..., 0], expected, atol=1.01
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels):
    image = np.stack([RAMP, RAMP[::-1], 255 - RAMP][:channels], -1)
    stored = transforms.decode_png(transforms.encode_png(image))
    np.testing.assert_array_equal(stored, image)


def test_a_stored_image_is_gray_or_colour():
    buffer = io.BytesIO()
    Image.fromarray(RAMP).convert("RGBA").save(buffer, "PNG")
    with pytest.raises(ValueError, match="mode RGBA, expected L .gray. or RGB"):
        transforms.decode_png(buffer.getvalue())


def dicom(values, **tags):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PhotometricInterpretation = 15, "MONOCHROME2"
    dataset.PixelData = values.astype(np.uint16).tobytes()
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_a_voi_lut_is_looked_up():
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4, 10, 8], [0, 255, 51, 102]
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.array([[0, 10, 11, 12, 13, 99]]))))
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    dataset.VOILUTSequence = [table]
    dataset.WindowCenter, dataset.WindowWidth = 500, 10  # The table comes first.
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    gray = transforms.decode_gray(buffer.getvalue(), "a.dcm")
    assert gray[0, :, 0].tolist() == [0, 0, 255, 51, 102, 102]
    # A window that is asked for replaces it.
    (frame,) = transforms.decode_frames(buffer.getvalue(), "a.dcm", (50, 100))
    assert frame[0, -1] == 252


def test_a_sigmoid_window():
    tags = {"WindowCenter": 100, "WindowWidth": 40, "VOILUTFunction": "SIGMOID"}
    values = np.array([[0, 80, 100, 120, 65535]])
    gray = transforms.decode_gray(dicom(values, **tags), "a.dcm")[0, :, 0]
    expected = 255 / (1 + np.exp(-4 * (values[0] - 100.0) / 40))
    np.testing.assert_allclose(gray, expected, atol=1)


HU = np.array([[-1350, -600, 150, 900]])  # Edges and centre of the lung window.
SLOPE = {"RescaleIntercept": -2000, "RescaleSlope": 1}


@pytest.mark.parametrize(
    "tags,expected",
    [
        ({"Modality": "CT"}, [0, 128, 255, 255]),
        ({"WindowCenter": 150, "WindowWidth": 1500}, [0, 0, 128, 255]),
        ({"WindowCenter": [150, 0], "WindowWidth": [1500, 9]}, [0, 0, 128, 255]),
        ({"Modality": "DX"}, [0, 85, 170, 255]),
        (
            {"Modality": "DX", "PhotometricInterpretation": "MONOCHROME1"},
            [255, 170, 85, 0],
        ),
    ],
)
def test_dicom_windows(tags, expected):
    gray = transforms.decode_gray(dicom(HU + 2000, **SLOPE, **tags), "a.dcm")
    np.testing.assert_allclose(gray[0, :, 0], expected, atol=1)


def test_dicom_without_pydicom_names_the_extra(monkeypatch):
    data = dicom(HU + 2000)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(
        ValueError, match=r"a\.dcm: DICOM needs pydicom: pip install pydicom"
    ):
        transforms.decode_gray(data, "a.dcm")


def test_dicom_stacks_and_missing_pixels_are_refused():
    frames = (HU + 2000).astype(np.uint16).tobytes() * 4
    stack = dicom(HU + 2000, NumberOfFrames=4, PixelData=frames)
    with pytest.raises(ValueError, match="4 frames"):
        transforms.decode_gray(stack, "a.dcm")
    with pytest.raises(ValueError, match=r"a\.dcm: cannot be read"):
        transforms.decode_gray(dicom(HU + 2000)[:-4], "a.dcm")


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_normalised_by_itself_has_mean_0_and_variance_1(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, channels), np.uint8)
    images[1] = 130  # Flat: no division by zero, no noise blown up.
    got = augment.normalise(jnp.asarray(images), *augment.PER_IMAGE)
    wide = np.broadcast_to(images, (3, 5, 7, 3)).astype(np.float64)
    axes = {"axis": (1, 2, 3), "keepdims": True}
    expected = (wide - wide.mean(**axes)) / np.maximum(wide.std(**axes), 1)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.any(got[1])
    gradient = jax.grad(lambda x: augment.normalise(x, (), ()).sum())
    assert np.isfinite(gradient(jnp.asarray(images, jnp.float32))).all()
