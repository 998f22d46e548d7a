"""Readers beside a live training: it ends as if nobody had looked."""

import shutil

import jax
import pytest
from training_process import Training, picture, same_end, template

from cxai_jax.training.checkpoint import Checkpoints

OPENS = 50


@pytest.mark.slow
def test_eval_predict_and_fifty_opens_beside_a_training(compiled, reference, tmp_path):
    wanted = template(tmp_path / "nowhere")
    compiled.mkdir(exist_ok=True)
    ended = ("results.json", "training_images.json", "training_features.npz")
    for name in ended:  # Of an earlier end.
        shutil.copy(reference / name, compiled / name)
    picture(tmp_path / "image.png")
    training = Training(compiled)
    training.wait_for_checkpoint(compiled)
    scoring = Training(compiled, "--mode=eval")
    predicting = Training(
        compiled,
        *("--workdir", compiled, "--out", tmp_path / "out"),
        *("--images", tmp_path / "image.png"),
        module="cxai_jax.predict",
    )
    steps = set()
    for _ in range(OPENS):
        reader = Checkpoints(compiled)
        state, step, _ = reader.restore("latest", wanted)
        assert int(jax.device_get(state.step)) == step
        steps.add(step)
        reader.close()
    second = Training(compiled)
    assert training.process.poll() is not None or second.end() == 1
    training.succeed()
    assert scoring.end() == 0, scoring.output
    assert predicting.end() == 0, predicting.output
    assert not (compiled / "checkpoints/damaged").exists()
    second.end()
    same_end(compiled, reference)
    assert len(steps) > 1
