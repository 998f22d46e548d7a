"""The cores of a CPU as devices that score side by side: how many, and the same values.

This file is also the program that a subprocess runs.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from as_program import report_of


def report() -> dict:
    """Runs in the subprocess: meshes, and what one and several devices answer."""
    import jax
    from small import small

    from cxai_jax import data, host
    from cxai_jax import mesh as meshes
    from cxai_jax.scoring import evaluate, explanations
    from cxai_jax.training import run as runs

    host.usable_cores = lambda: 6
    host.one_device_a_core()
    found = {"devices": jax.device_count(), "training": meshes.training_mesh().size}
    found["scoring"] = {n: meshes.scoring_mesh(n).size for n in (1, 7, 8, 24, 32)}
    if not host.cores:
        return found
    config = small(**{"eval.batch_size": 8})
    records = data.load(config.data).splits["test"]
    network = runs.build_network(config, 2)
    variables = meshes.put_replicated(network.variables, meshes.training_mesh())
    given = network.model, network.scale, config
    for mesh in (meshes.scoring_mesh(8), meshes.make_mesh(1)):
        scored = evaluate.Evaluator(*given, mesh).predict(variables, records)
        maps = explanations.explain(*given, mesh, variables, records)
        for name, value in {**scored, **maps}.items():
            if value.dtype.kind == "f":
                found.setdefault(name, []).append(value.tolist())
    return found | drawn_maps()


def drawn_maps() -> dict:
    """What predict draws, on two devices and on one."""
    from untrained_run import make_run

    from cxai_jax import mesh as meshes
    from cxai_jax.inference import predictor, shown_maps

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder))
        trained = predictor.load(Path(folder))
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 1), np.uint8)
    for kind in ("gradcam", "gradient", "occlusion"):
        for mesh in (meshes.make_mesh(2), meshes.make_mesh(1)):
            answer = predictor.Predictor(trained, mesh)
            draw = shown_maps.make_maps(trained, kind, answer.batch_size, mesh)
            maps = draw(images, answer(images), {})
            found.setdefault(f"drawn {kind}", []).append(maps.tolist())
    return found


def run_report(flags: str = "") -> dict:
    return report_of(__file__, flags=flags, JAX_DISABLE_MOST_OPTIMIZATIONS="1")


@pytest.fixture(scope="module")
def found():
    return run_report()


def test_training_takes_one_core_and_scoring_those_that_divide_the_batch(found):
    assert found["devices"] == 6 and found["training"] == 1
    # Four images each at least, and a number that divides the batch.
    assert found["scoring"] == {"1": 1, "7": 1, "8": 2, "24": 6, "32": 4}


def test_several_cores_answer_what_one_does(found):
    names = {"probs", "class_maps", "pooled", "cam", "occlusion", "deletion"}
    names |= {"drawn gradcam", "drawn gradient", "drawn occlusion"}
    assert names < found.keys()
    for name in found.keys() - {"devices", "training", "scoring"}:
        several, one = map(np.array, found[name])
        scale = max(np.abs(one).max(), 1e-6)
        np.testing.assert_allclose(several / scale, one / scale, atol=2e-5)
    assert np.ptp(np.array(found["probs"][1])) > 0


def test_what_somebody_else_said_of_the_devices_stays():
    found = run_report("--xla_force_host_platform_device_count=3")
    assert found["devices"] == found["training"] == 3
    assert set(found["scoring"].values()) == {3}


if __name__ == "__main__":
    print(json.dumps(report()))
