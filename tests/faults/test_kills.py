"""kill -9 at twenty random moments, half of them in a save: the end is the same."""

import json
import random
import time

import pytest
from training_process import Training, same_end

KILLS = 20


@pytest.mark.slow
def test_twenty_kills_change_nothing(compiled, reference):
    draw = random.Random(0)
    in_save = 0
    for number in range(KILLS):
        training = Training(compiled)
        training.wait_for("compiled in|report: ")
        if number % 2:
            while training.process.poll() is None:
                if list(compiled.glob("checkpoints/*/*tmp*")):
                    in_save += 1
                    break
        else:
            time.sleep(draw.uniform(0, 0.5))
        training.process.kill()
        training.end()
        # Lines may be cut short; what is whole can be read.
        for row in (compiled / "metrics.jsonl").read_text().splitlines()[:-1]:
            json.loads(row)
    assert in_save >= KILLS // 4
    Training(compiled).succeed()
    same_end(compiled, reference)
