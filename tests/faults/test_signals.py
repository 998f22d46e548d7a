"""SIGTERM and SIGINT wherever a run may be: one line, the right code, the same end."""

import signal

import pytest
from training_process import Training, same_end

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stopped(training, number):
    training.process.send_signal(number)
    assert training.end() == 128 + number, training.output
    training.one_line(f"^stopped by {number.name} .*; the same command continues$")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_in_compilation(tmp_path, number):
    training = Training(tmp_path / "run", env={"JAX_LOG_COMPILES": "1"})
    training.wait_for(r"Finished tracing .* transforming call|Compiling jit\(call\)")
    stopped(training, number)
    assert "compilation" in training.output


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_and_in_a_save(compiled, reference, number):
    training = Training(compiled)
    training.wait_for("step 3/")
    stopped(training, number)
    training = Training(compiled)
    training.wait_for("continuing")
    training.until(lambda: list(compiled.glob("checkpoints/*/*tmp*")), "a save")
    stopped(training, number)
    Training(compiled).succeed()
    same_end(compiled, reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_in_scoring(compiled, reference, number):
    training = Training(compiled)
    training.wait_for(r"step (\d+)/\1 ")
    stopped(training, number)
    scoring = Training(compiled, "--mode=eval", env={"JAX_LOG_COMPILES": "1"})
    scoring.wait_for(r"Compiling jit\(predict")
    stopped(scoring, number)
    Training(compiled).succeed()
    same_end(compiled, reference)


@pytest.mark.slow
def test_the_second_signal_means_now(compiled):
    training = Training(compiled, env={"JAX_LOG_COMPILES": "1"})
    training.wait_for("step 2/")
    training.process.send_signal(signal.SIGTERM)
    training.process.send_signal(signal.SIGTERM)
    assert training.end() == 128 + signal.SIGTERM
    training.one_line("^stopped by SIGTERM .*; the same command continues$")
