"""Compiled programs on disk: loaded where nothing differs, else compiled anew."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.inference.program_cache import Executables


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("jaxlib", "jaxlib was '0.0.1' and is '"),
        ("device", "device was 'abacus' and is '"),
        ("settings", "settings was 'other' and is '"),
        ("content", "the file is damaged: its checksum differs"),
        ("head", "the file is damaged"),
        ("cut", "the file is damaged: its checksum differs"),
    ],
)
def test_stale_and_damaged_programs_are_compiled_anew(tmp_path, caplog, change, said):
    def run():
        def double(x):  # A new one, or JAX remembers the trace.
            traced.append(x.shape)
            return 2 * x

        programs = Executables(tmp_path, config="a")
        return programs.jit(double)(np.ones(3, np.float32))

    traced = []
    run()
    (path,) = tmp_path.iterdir()
    line, _, content = path.read_bytes().partition(b"\n")
    if change == "content":
        content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    elif change == "cut":
        content = content[: len(content) // 2]
    elif change == "head":
        line = b"{"
    else:
        other = {"jaxlib": "0.0.1", "device": "abacus", "settings": "other"}[change]
        line = json.dumps(json.loads(line) | {change: other}).encode()
    path.write_bytes(line + b"\n" + content)
    np.testing.assert_array_equal(run(), [2, 2, 2])
    assert len(traced) == 2
    assert said in caplog.text and str(path) in caplog.text
    np.testing.assert_array_equal(run(), [2, 2, 2])
    assert len(traced) == 2, "the file was replaced"


def test_programs_differ_by_shape_type_and_donate(tmp_path):
    def run(*arguments):
        def shift(x, y):
            traced.append(x.shape)
            return x + y

        made = Executables(tmp_path).jit(shift, donate_argnums=0)
        return made(*map(jnp.asarray, arguments))

    traced = []
    for _ in range(2):
        for size, kind in ((3, np.float32), (4, np.float32), (3, np.int32)):
            x = np.arange(size, dtype=kind)
            out = run(x, x)
            np.testing.assert_array_equal(out, 2 * x)
            assert out.dtype == kind
    assert len(traced) == len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(tmp_path, caplog):
    (tmp_path / "file").touch()
    made = Executables(tmp_path / "file").jit(jnp.negative)
    np.testing.assert_array_equal(made(np.ones(2, np.float32)), [-1, -1])
    assert "not stored" in caplog.text
