"""Writes tests/golden/optimizer.json: trajectories of torch.optim in float64.

    python tests/golden/make_optimizer.py     (with torch and numpy installed)

Three vectors, `trunk/kernel`, `head/kernel` and `stem/kernel` (frozen in some cases),
follow the gradients that `gradient` defines; every case stores them after each of 30
steps. The cases are read by tests/training/test_optimizer.py.
"""

import json
from pathlib import Path

import numpy as np
import torch

STEPS = 30
START = {
    "trunk": [0.5, -1.2, 2.0],
    "head": [1.5, 0.3, -0.7],
    "stem": [0.9, -0.4, 0.1],
}
CASES = {
    "constant": {},
    "multistep": {"schedule": "multistep"},
    "cosine with warm-up": {"schedule": "cosine", "warmup": 0.2},
    "two rates, frozen stem": {"schedule": "cosine", "frozen": ["stem"]},
    "adam": {"name": "adam", "schedule": "cosine", "frozen": ["stem"]},
    "adamw": {"name": "adamw", "schedule": "cosine", "frozen": ["stem"]},
    "adam, clipped": {"name": "adam", "clip_norm": 0.7},
    "clipped": {"schedule": "multistep", "clip_norm": 0.7, "frozen": ["stem"]},
}
DEFAULTS = {
    "name": "sgd",
    "lr_trunk": 0.02,
    "lr_fresh": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "schedule": "constant",
    "milestones": [0.4, 0.75, 0.9],
    "gamma": 0.1,
    "warmup": 0.0,
    "clip_norm": 0.0,
    "frozen": [],
}


def gradient(name: str, values, step: int):
    """Of a bowl that wobbles: different in every element, parameter and step."""
    phase = {"trunk": 0.1, "head": 0.7, "stem": 1.3}[name]
    index = np.arange(3)
    return 0.6 * values + np.sin(step + phase + index)


def schedule(optimizer, case: dict):
    """The learning rates of `case` by torch's own schedulers."""
    found = torch.optim.lr_scheduler
    if case["schedule"] == "constant":
        return found.ConstantLR(optimizer, factor=1.0)
    if case["schedule"] == "multistep":
        milestones = [round(share * STEPS) for share in case["milestones"]]
        return found.MultiStepLR(optimizer, milestones, gamma=case["gamma"])
    warmup = round(case["warmup"] * STEPS)
    cosine = found.CosineAnnealingLR(optimizer, T_max=STEPS - warmup)
    if not warmup:
        return cosine
    ramp = found.LambdaLR(optimizer, lambda step: step / warmup)
    return found.SequentialLR(optimizer, [ramp, cosine], milestones=[warmup])


def trajectory(case: dict) -> dict:
    """Parameter name -> values after each step."""
    values = {
        name: torch.tensor(start, dtype=torch.float64, requires_grad=True)
        for name, start in START.items()
    }
    trained = [name for name in values if name not in case["frozen"]]
    rates = {"trunk": case["lr_trunk"], "stem": case["lr_trunk"]}
    groups = [
        {"params": [values[name]], "lr": rates.get(name, case["lr_fresh"])}
        for name in trained
    ]
    kind, own = {
        "sgd": (torch.optim.SGD, {"momentum": case["momentum"], "nesterov": True}),
        "adam": (torch.optim.Adam, {"betas": (case["momentum"], 0.999)}),
        "adamw": (torch.optim.AdamW, {"betas": (case["momentum"], 0.999)}),
    }[case["name"]]
    optimizer = kind(groups, weight_decay=case["weight_decay"], **own)
    scheduler = schedule(optimizer, case)
    found = {name: [] for name in values}
    for step in range(STEPS):
        for name in trained:
            slope = gradient(name, values[name].detach().numpy(), step)
            values[name].grad = torch.tensor(slope, dtype=torch.float64)
        if case["clip_norm"]:
            chosen = [values[name] for name in trained]
            torch.nn.utils.clip_grad_norm_(chosen, case["clip_norm"])
        optimizer.step()
        scheduler.step()
        for name, value in values.items():
            found[name].append(value.tolist())
    return found


def main() -> None:
    cases = {
        name: {"settings": DEFAULTS | changes, "values": trajectory(DEFAULTS | changes)}
        for name, changes in CASES.items()
    }
    page = {"torch": torch.__version__, "start": START, "cases": cases}
    target = Path(__file__).with_name("optimizer.json")
    target.write_text(json.dumps(page) + "\n")


if __name__ == "__main__":
    main()
