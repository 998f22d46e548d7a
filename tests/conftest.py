"""Shared fixtures. Compilation is what tests spend their time on: programs are cached
for the session and, but for slow tests, LLVM spends less on them than in use."""

import os
import shutil
from pathlib import Path

import jax
import pytest

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared"


def pytest_configure(config):
    if config.option.markexpr == "not slow":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {flags}"


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # One cache for all workers.
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The workdir of a training in a process of its own that nothing interrupted."""
    from training_process import Training

    workdir = tmp_path_factory.mktemp("reference") / "run"
    Training(workdir).succeed()
    return workdir


@pytest.fixture
def compiled(reference, tmp_path):
    """An empty workdir in which the same programs need not be compiled again."""
    workdir = tmp_path / "run"
    shutil.copytree(reference / "xla_cache", workdir / "xla_cache")
    return workdir


@pytest.fixture
def shared():
    """The folder of real data beside the checkout; the test skips without it."""
    if not SHARED.exists():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture
def float64():
    """Admits float64; jax.enable_x64 is newer than jax 0.7."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64
    else:
        context = jax.experimental.enable_x64
    with context(True):
        yield


@pytest.fixture
def dicom(tmp_path):
    """Writes a DICOM file of int16 pixels [F, H, W] and returns its path."""
    pydicom = pytest.importorskip("pydicom")

    def write(pixels=None, syntax=None, **fields):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        plain = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = syntax or plain
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.3"
        data.PatientID, data.SeriesInstanceUID, data.Modality = "ann", "1.4", "CT"
        if pixels is not None:
            data.PixelData = pixels.astype("<i2").tobytes()
            data.NumberOfFrames, data.Rows, data.Columns = pixels.shape
            data.BitsAllocated = data.BitsStored = 16
            data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 1, 1
            data.PhotometricInterpretation = "MONOCHROME2"
            data.RescaleSlope, data.RescaleIntercept = 2, -1000
        for name, value in fields.items():
            setattr(data, name, value)
        path = tmp_path / "scan"
        data.save_as(path, enforce_file_format=True)
        return path

    return write
