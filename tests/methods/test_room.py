"""The room for methods: two networks, two optimisers, a labelled and an unlabelled
stream, trained, killed and resumed by the same loop as every other run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import struct
from small import small

from cxai_jax import methods
from cxai_jax.inference import predictor
from cxai_jax.methods import parts
from cxai_jax.methods.method import Method
from cxai_jax.scoring import evaluate
from cxai_jax.training import loop
from cxai_jax.types import Array, PyTree


class Judge(nn.Module):
    """Tells source from target by the pooled features."""

    @nn.compact
    def __call__(self, features):
        return nn.Dense(1)(features.mean((1, 2)))[:, 0]


@struct.dataclass
class State:
    step: Array
    params: dict[str, PyTree]  # By network: "classifier", "judge".
    batch_stats: PyTree
    opt_state: dict[str, PyTree]


def make_adversary(config, network, optimizer, *, total_steps, groups):
    """Source images are classified, a judge learns to tell the target's apart."""
    judge, adam = Judge(), optax.adam(1e-2)

    def init(key, variables):
        features = jnp.zeros((1, 2, 2, 64))
        params = {
            "classifier": variables["params"],
            "judge": judge.init(key, features)["params"],
        }
        opt_state = {
            "classifier": optimizer.init(params["classifier"]),
            "judge": adam.init(params["judge"]),
        }
        stats = variables["batch_stats"]
        return State(jnp.zeros((), jnp.int32), params, stats, opt_state)

    def step(state, batches, key):
        keys = jax.random.split(jax.random.fold_in(key, state.step))
        assert batches["target"].labels is None
        images = [
            parts.prepare(k, batches[name], config, network.scale)
            for k, name in zip(keys, ("source", "target"), strict=True)
        ]

        def classify(params):
            (logits, out), stats = parts.forward(
                network.model, params, state.batch_stats, images[0], "train"
            )
            labels = batches["source"].labels
            value = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return value.mean(), (out.features, stats)

        (loss, (features, stats)), gradient = jax.value_and_grad(
            classify, has_aux=True
        )(state.params["classifier"])
        (_, other), _ = parts.forward(
            network.model, state.params["classifier"], stats, images[1], "explain"
        )

        def tell(params):
            scores = [
                judge.apply({"params": params}, f) for f in (features, other.features)
            ]
            return sum(
                optax.sigmoid_binary_cross_entropy(s, jnp.full_like(s, t)).mean()
                for s, t in zip(scores, (1.0, 0.0), strict=True)
            )

        judged, judge_gradient = jax.value_and_grad(tell)(state.params["judge"])
        params, opt_state = {}, {}
        for name, tool, grad in (
            ("classifier", optimizer, gradient),
            ("judge", adam, judge_gradient),
        ):
            changes, opt_state[name] = tool.update(
                grad, state.opt_state[name], state.params[name]
            )
            params[name] = optax.apply_updates(state.params[name], changes)
        state = State(state.step + 1, params, stats, opt_state)
        return state, {"loss": loss, "judge": judged}

    return Method(
        streams=("source", "target"),
        init=init,
        step=step,
        scored=lambda state: {
            "params": state.params["classifier"],
            "batch_stats": state.batch_stats,
        },
    )


@pytest.fixture(scope="module", autouse=True)
def adversary():
    methods.METHODS["adversary"] = make_adversary
    yield
    del methods.METHODS["adversary"]


def adversary_config(**changes):
    fields = {"method": "adversary", "data.target": "val", "tta.k": 0}
    fields["data.phantom_images"] = 80
    return small("baseline", **fields | changes)


def rows_of(workdir):
    rows = [json.loads(r) for r in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adversary")
    return workdir, loop.train(adversary_config(), workdir)


def test_both_networks_learn(finished):
    workdir, results = finished
    losses = [row["judge"] for row in rows_of(workdir)]
    assert len(losses) == results["steps"] and np.isfinite(losses).all()
    assert losses[-1] != losses[0]
    assert results["config"]["method"] == "adversary"


def test_it_resumes_to_the_bit_and_streams_may_be_fed(finished, tmp_path):
    workdir, whole = finished
    steps = [int(p.name) for p in (workdir / "checkpoints/latest").iterdir()]
    assert min(steps) < whole["steps"]
    (tmp_path / "checkpoints/latest").mkdir(parents=True)
    shutil.copytree(
        workdir / f"checkpoints/latest/{min(steps)}",
        tmp_path / f"checkpoints/latest/{min(steps)}",
    )
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(workdir / name, tmp_path / name)
    again = loop.train(adversary_config(), tmp_path)
    assert again["metrics"] == whole["metrics"]
    assert rows_of(tmp_path) == rows_of(workdir)
    first, second = (
        evaluate.load_predictions(d / "predictions_test.npz")["logits"]
        for d in (workdir, tmp_path)
    )
    np.testing.assert_array_equal(first, second)
    fed = loop.train(adversary_config(**{"data.residency": "host"}), tmp_path / "host")
    assert fed["time"]["residency"] == "host"
    for ours, theirs in zip(rows_of(tmp_path / "host"), rows_of(workdir), strict=True):
        np.testing.assert_allclose(ours["judge"], theirs["judge"], rtol=2e-4)


def test_the_scored_network_is_the_one_that_predicts(finished):
    workdir, _ = finished
    trained = predictor.load(workdir)
    assert set(trained.variables) == {"params", "batch_stats"}
    assert "head" in trained.variables["params"]


def test_target_labels_are_not_read(finished, tmp_path, monkeypatch):
    """Other labels of the unlabelled stream, the same run."""
    from cxai_jax import data

    def shuffled(config, load=data.load):
        dataset = load(config)
        labels = dataset.splits["val"].labels
        labels[:] = 1 - labels
        return dataset

    monkeypatch.setattr(data, "load", shuffled)
    loop.train(adversary_config(), tmp_path)
    workdir, _ = finished
    assert rows_of(tmp_path) == rows_of(workdir)


@pytest.mark.parametrize(
    "changes,words",
    [
        (
            {"data.target": ""},
            ["config.method=adversary", "config.data.target", "usps"],
        ),
        ({"data.target": "valid"}, ["config.data.target", "valid", "val"]),
        ({"method": "adversari"}, ["config.method", "adversari", "guided"]),
        ({"data.target": "mars:train"}, ["config.data.target", "mars"]),
    ],
)
def test_a_stream_without_data_is_named(tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        loop.train(adversary_config(**changes), tmp_path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
