"""The whole train step over 8 virtual devices: what crosses them, and the same loss.

The devices have to exist before JAX starts, so this file is also the program that a
subprocess runs; it prints one JSON object.
"""

import json
import sys

import pytest
from as_program import report_of
from hlo import collectives

SIZE, CANVAS, BATCH = 32, 40, 24
FIELDS = {
    "model.name": "tiny",
    "cpe.normalize": True,
    "mix.groups": 8,  # The same partners on any number of devices.
    "augment.crop": "random",
    "augment.hflip": True,
    "augment.vflip": True,
    "data.resize": CANVAS,
}


def report(accumulate: int) -> dict:
    """Runs in the subprocess: the same steps on 8 devices and on one."""
    import jax

    from tools import benchmark_programs as programs

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name)
    )
    result = {"devices": jax.device_count()}
    fields = {**FIELDS, "train.accumulate": accumulate}
    for devices in (8, 1):
        program = programs.step_program(
            batch=BATCH * accumulate, size=SIZE, devices=devices, **fields
        )
        first = program.run(1)
        compilations.clear()
        losses = [first] + [program.run(1) for _ in range(2)]
        result[str(devices)] = {
            "losses": losses,
            "collectives": collectives(program.hlo),
            "aliased": program.about["donated_bytes"],
            "state": program.about["state_bytes"],
            "compilations": sum("backend_compile" in name for name in compilations),
        }
    return result


def run_report(accumulate: int) -> dict:
    flags = "--xla_force_host_platform_device_count=8"
    # What is looked at is decided by the partitioner, not by the code generator.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return report_of(__file__, str(accumulate), flags=flags, **quick)


@pytest.fixture(scope="module")
def found():
    return run_report(accumulate=1)


def shapes(found: dict, *kinds: str) -> list[tuple]:
    return [tuple(dims) for kind, dims in found["8"]["collectives"] if kind in kinds]


def assert_images_stay(found: dict) -> None:
    # Maps of an image, of its canvas or of a stage have two equal sides among these;
    # kernels are 3x3.
    sides = {SIZE, CANVAS, SIZE // 2, SIZE // 4, SIZE // 8}
    for kind, dims in found["8"]["collectives"]:
        pairs = zip(dims, dims[1:], strict=False)
        is_map = len(dims) > 2 and any(a == b and a in sides for a, b in pairs)
        assert not is_map or dims[:2] == [3, 3], f"{kind} of {dims}"
    # In whatever shape: one image has 1,024 elements per channel, the largest kernel
    # 27,648, fewer than the batch's images. Row numbers, random keys and the 16 cells
    # per image that CPE ranks may be shared.
    moved = shapes(found, "all-gather", "all-to-all", "collective-permute")
    assert all(elements(dims) < SIZE * SIZE for dims in moved), moved
    reduced = shapes(found, "all-reduce", "reduce-scatter")
    assert all(elements(dims) <= 3 * 3 * 48 * 64 for dims in reduced), reduced


def elements(dims: tuple) -> int:
    count = 1
    for side in dims:
        count *= side
    return count


def test_the_subprocess_has_eight_devices(found):
    assert found["devices"] == 8
    assert found["1"]["collectives"] == []


def test_gradients_and_statistics_are_reduced(found):
    reduced = shapes(found, "all-reduce")
    # Gradients of the four kernels of `tiny`, and per-channel sums of its norms.
    for kernel in ((16, 32), (32, 48), (48, 64)):
        assert any(
            sorted(dims) == sorted((3, 3, *kernel))
            or dims == (9 * kernel[0], kernel[1])
            for dims in reduced
        ), (kernel, reduced)
    assert any(dims in ((16,), (32,), (48,), (64,)) for dims in reduced), reduced


def test_no_image_crosses_devices(found):
    assert_images_stay(found)


def test_loss_equals_that_of_one_device(found):
    many, one = found["8"]["losses"], found["1"]["losses"]
    assert many[0] == pytest.approx(one[0], rel=1e-5)
    # Sums in another order, amplified by batch norm over a step or two.
    assert many == pytest.approx(one, rel=1e-3)
    assert len(set(one)) == len(one)


def test_donation_aliases_the_whole_state(found):
    for devices in ("1", "8"):
        assert found[devices]["aliased"] >= found[devices]["state"] > 0


def test_nothing_compiles_after_the_first_step(found):
    for devices in ("1", "8"):
        assert found[devices]["compilations"] == 0


@pytest.mark.slow
def test_accumulated_steps_keep_images_where_they_are():
    found = run_report(accumulate=2)
    assert_images_stay(found)
    many, one = found["8"]["losses"], found["1"]["losses"]
    assert many[0] == pytest.approx(one[0], rel=1e-5)


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1]))))
