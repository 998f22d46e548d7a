"""Hostile input: hundreds of broken files, and a fuzz of every parser.

Whatever is read, the answer is data or one line that names the file.
"""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cxai_jax.data import cxr, folder, inputs, sites, store
from cxai_jax.models import pretrained

HERE = Path(__file__).parent
BOUND = 1_000_000_000  # Bytes, peak of one image.
WEIGHTS = 300_000_000  # Of weights: the sound ones are tiny, the bomb is refused.
few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow
def test_broken_files_are_lines_in_bounded_time_and_memory(tmp_path):
    out = tmp_path / "outcomes.json"
    done = subprocess.run(
        [sys.executable, HERE / "bad_input.py", out],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    found = json.loads(out.read_text())
    assert found["cases"] >= 500
    bad = [r for r in found["rows"] if not r["said"].startswith(("opened", "line:"))]
    assert not bad
    for row in found["rows"]:
        most = WEIGHTS if row["group"] == "weights" else BOUND
        assert row["peak"] <= most, row


def answered(read, path) -> None:
    """Reads; only one line that names the file may be raised."""
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert "\n" not in text
        assert Path(path).name in text or str(Path(path).parent) in text, text


cells = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["file", "split", "patient", "a/0.png", "b/0.png", "0.png", "train", "test"]
        + ["=1", '"', "", "\x00", "..", "/", "val", "a" * 300]
    ),
)
tables = st.lists(st.lists(cells, max_size=4).map(",".join), max_size=8).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
)
contents = st.one_of(
    tables,
    tables.map(lambda text: b"file,split\n" + text),
    tables.map(lambda text: b"file,patient\n" + text),
    st.binary(max_size=200),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes of two images, as every source wants them named."""
    root = tmp_path_factory.mktemp("tree")
    names = [f"{c}/{i}.png" for c in ("a", "b") for i in range(2)]
    names += [f"site/{c} ({i}).png" for c in ("COVID/x", "non-COVID/y") for i in "12"]
    names += [f"cxr/{c}/{i}.png" for c in ("images", "lung_masks") for i in range(2)]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)
    (root / "classes").mkdir()
    for name in ("a", "b"):
        (root / name).rename(root / "classes" / name)
    return root


@few
@given(content=contents)
def test_splits(tree, content):
    path = tree / "classes" / "splits.csv"
    path.write_bytes(content)
    answered(lambda _: folder.plan_folder(path.parent), path)
    path.unlink()


@few
@given(content=contents)
def test_patients(tree, content):
    path = tree / "classes" / "patients.csv"
    path.write_bytes(content)
    answered(lambda _: folder.plan_folder(path.parent), path)
    found = inputs.find([str(path.parent)])
    assert len(found.files) == 4
    assert all("\n" not in reason for _, reason in found.errors)
    path.unlink()


labels = st.sampled_from(["COVID-19", "normal", "0", "1", "2", "", "COVID", "=1"])
wang = st.lists(
    st.tuples(cells, st.sampled_from(["x (1).png", "y (2).png", "z.png", ""]), labels),
    max_size=6,
).map(lambda rows: "\n".join(map(" ".join, rows)).encode("utf-8", "surrogatepass"))


@few
@given(content=st.one_of(wang, contents))
def test_lists_of_wang_and_their_labels(tree, content):
    path = tree / "train.txt"
    path.write_bytes(content)
    site = tree / "site"
    answered(lambda _: sites.plan_site_a(site, "wang", [path]), path)


rows = st.lists(
    st.tuples(
        st.sampled_from(["0.png", "1.png", "../0.png", "/dev/zero", "", "a" * 300]),
        cells,
        st.sampled_from(["COVID-19", "todo", "x", ""]),
        st.sampled_from(["0.png", "", "../x.png", "\x00"]),
    ).map(",".join),
    max_size=6,
)
metadata = rows.map(
    lambda lines: "\n".join(["filename,patientid,finding,lung_mask", *lines]).encode()
)


@few
@given(content=st.one_of(metadata, contents))
def test_metadata(tree, content):
    path = tree / "cxr" / "metadata.csv"
    path.write_bytes(content)
    answered(lambda _: cxr.plan_cxr(path.parent), path)


@few
@given(content=contents)
def test_an_index_of_prepared_data(tree, content):
    path = tree / "index.csv"
    for head in (b"", b"split,name,label,site,patient\n"):
        path.write_bytes(head + content)
        answered(store._read_index, path)


def sound_weights(kind):
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, a=np.zeros(3, np.float32))
    else:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("w/data.pkl", b"\x80\x02}X\x01\x00\x00\x00aK\x01s.")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["npz", "pth", "safetensors"])
@few
@given(data=st.data())
def test_weights(tree, kind, data):
    path = tree / f"w.{kind}"
    content = data.draw(st.binary(max_size=60))
    if kind != "safetensors" and data.draw(st.booleans()):
        whole = bytearray(sound_weights(kind))
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + len(content)] = content
        content = bytes(whole)
    path.write_bytes(content)
    answered(lambda p: pretrained.read_tensors(str(p), 10**6), path)


@few
@given(opcodes=st.lists(st.sampled_from(range(256)), max_size=40).map(bytes))
def test_pickles(tree, opcodes):
    path = tree / "p.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + opcodes)
    answered(lambda p: pretrained.read_tensors(str(p), 10**6), path)
