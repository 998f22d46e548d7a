"""What is found to be predicted, and the slices inside a DICOM file."""

import os

import numpy as np
import pytest

from cxai_jax.data import inputs, privacy, transforms


def test_inputs_are_found_once_and_in_order(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/2.png", "a/1.JPG", "a/.hidden.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "a/IM0001").write_bytes(bytes(128) + b"DICM")  # No suffix.
    found = inputs.find([str(tmp_path / "*"), str(tmp_path / "b.png")])
    names = [path.relative_to(tmp_path).as_posix() for path in found.files]
    assert names == ["a/1.JPG", "a/2.png", "a/IM0001", "b.png"]
    assert found.errors == []
    assert [os.path.basename(name) for name in found.ignored] == [".hidden.png"]


def test_dicom_frames_become_slices_with_lut_and_window(dicom):
    pixels = np.array([[[0, 200]], [[500, 900]]])  # -1000, -600 and 0, 800 HU.
    path = dicom(pixels)
    first, second = inputs.open_slices(path)
    assert (first.name, second.name) == (f"{path}#1", f"{path}#2")
    assert first.patient == "ann" and first.gray.shape == (1, 2, 1)
    # Lung window -600, 1500: -1350..150 HU.
    np.testing.assert_array_equal(first.gray.ravel(), [60, 128])
    np.testing.assert_array_equal(second.gray.ravel(), [230, 255])
    wide = inputs.open_slices(path, window=(0.0, 2000.0), patient="bob")
    np.testing.assert_array_equal(wide[1].gray.ravel(), [128, 230])
    assert wide[1].patient == "bob"
    own = dicom(pixels[:1], WindowCenter=-800, WindowWidth=400)
    np.testing.assert_array_equal(inputs.open_slices(own)[0].gray.ravel(), [0, 255])


def test_enhanced_dicom_keeps_lut_and_window_in_its_functional_groups(dicom):
    pydicom = pytest.importorskip("pydicom")

    def group(name, **values):
        inner, outer = pydicom.Dataset(), pydicom.Dataset()
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(outer, f"{name}Sequence", [inner])
        return outer

    lut = {"RescaleSlope": 2, "RescaleIntercept": -1000, "RescaleType": "HU"}
    path = dicom(
        np.array([[[0, 200]], [[0, 200]]]),  # -1000, -600 HU.
        RescaleSlope=None,
        RescaleIntercept=None,
        SharedFunctionalGroupsSequence=[group("PixelValueTransformation", **lut)],
        PerFrameFunctionalGroupsSequence=[
            group("FrameVOILUT", WindowCenter=-800, WindowWidth=400),
            group("FrameVOILUT", WindowCenter=-1000, WindowWidth=800),
        ],
    )
    first, second = inputs.open_slices(path)
    np.testing.assert_array_equal(first.gray.ravel(), [0, 255])
    np.testing.assert_array_equal(second.gray.ravel(), [128, 255])


def test_dicom_monochrome1_is_inverted_and_the_series_names_the_patient(dicom):
    path = dicom(
        np.array([[[0, 900]]]), PhotometricInterpretation="MONOCHROME1", PatientID=""
    )
    (only,) = inputs.open_slices(path, window=(0.0, 2000.0))
    np.testing.assert_array_equal(only.gray.ravel(), [255, 25])
    assert only.patient == "1.4"


def test_dicom_without_readable_pixels_says_why(dicom):
    with pytest.raises(ValueError, match="without pixels, such as a report"):
        inputs.open_slices(dicom())
    compressed = dicom(np.zeros((1, 1, 2)))
    data = compressed.read_bytes()
    jpeg_ls = b"1.2.840.10008.1.2.4.80"
    plain = b"1.2.840.10008.1.2.1\0"
    header = data.replace(b"UI\x14\0" + plain, b"UI\x16\0" + jpeg_ls)
    compressed.write_bytes(header)
    with pytest.raises(ValueError, match="no decoder is installed for JPEG-LS"):
        inputs.open_slices(compressed)


def test_a_volume_is_refused_where_one_image_is_expected(dicom):
    with pytest.raises(ValueError, match="2 frames"):
        transforms.open_gray(dicom(np.zeros((2, 4, 4))))


def test_pseudonyms_tell_patients_apart_and_data_sets_too():
    assert privacy.pseudonym("", "a") == ""
    names = {privacy.pseudonym(p, salt) for p in ("1", "2") for salt in ("a", "b")}
    assert len(names) == 4 and privacy.pseudonym("1", "a") in names
