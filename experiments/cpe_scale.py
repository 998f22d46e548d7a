"""How large CPE and its gradient are beside the cross-entropy, before any training.

python -m experiments.cpe_scale --data_dir=data

Lite0 with ImageNet weights and a fresh head, the first batches of site B's training
split, unmixed (row `cpe`). A form of CPE is one (normalize, sqrt_d, temperature); the
gradient norm is over all parameters. Loss and gradient are linear in config.cpe.weight,
so the ratios at 0.1 and 0.01 are those at 1 times the weight. Writes
results/cpe_scale.json.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax import data
from cxai_jax.data import pipeline
from cxai_jax.maps.cam import of_class, patch_relevance
from cxai_jax.methods import parts
from cxai_jax.objectives import losses
from cxai_jax.training import preview
from cxai_jax.training.results import versions
from cxai_jax.training.run import build_network, epoch_rows
from cxai_jax.types import Batch
from cxai_jax.writer import write_json
from experiments.compare import make_config, sized

RESULT = Path(__file__).parent / "results" / "cpe_scale.json"
FORMS = {
    "raw": {"normalize": False},
    "raw / sqrt(D)": {"normalize": False, "sqrt_d": True},
    "normalised, temperature 1": {"normalize": True},
    "normalised, temperature 0.5": {"normalize": True, "temperature": 0.5},
    "normalised, temperature 0.1": {"normalize": True, "temperature": 0.1},
}
WEIGHTS = (1.0, 0.1, 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="of prepared data")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    options = parser.parse_args()
    fields = [f"data.data_dir={options.data_dir!r}", "data.fit=train"]
    config = make_config(
        "configs/siteB.py", "cpe,lite0,short", [*fields, *sized(options.size)]
    )
    dataset = data.load(config.data)
    records = dataset.splits["train"]
    network = build_network(config, len(dataset.class_names))
    measure = jax.jit(lambda *given: measured(config, network, *given))
    size = config.train.batch_size
    stream = pipeline.row_stream(epoch_rows(config, records), size, config.seed)
    found = []
    for step in range(options.batches):
        rows = stream[step]
        images, sizes = preview.sources(config, records, rows)
        batch = Batch(
            images=jnp.asarray(images),
            sizes=jnp.asarray(sizes),
            labels=jnp.asarray(records.labels[rows], jnp.int32),
            sites=jnp.zeros(size, jnp.int32),
            valid=jnp.ones(size, bool),
        )
        found.append(measure(network.variables, batch, jax.random.key(step)))
    values, norms = np.mean(jax.device_get(found), axis=0)
    forms = {
        name: {
            "loss": float(value),
            "gradient_norm": float(norm),
            "by_weight": {
                str(weight): {
                    "loss_ratio": float(weight * value / values[0]),
                    "gradient_ratio": float(weight * norm / norms[0]),
                }
                for weight in WEIGHTS
            },
        }
        for name, value, norm in zip(FORMS, values[1:], norms[1:], strict=True)
    }
    page = {
        "data": f"{dataset.name}, split train ({len(records)} images)",
        "fingerprint": dataset.fingerprint,
        "backbone": "efficientnet_lite0, ImageNet weights, fresh head",
        "pixels": options.size,
        "batches": options.batches,
        "batch_size": size,
        "seed": config.seed,
        "cross_entropy": {"loss": float(values[0]), "gradient_norm": float(norms[0])},
        "cpe": forms,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    write_json(RESULT, page)
    print(f"cross-entropy: loss {values[0]:.3g}, gradient norm {norms[0]:.3g}")
    for name, form in forms.items():
        whole = form["by_weight"]["1.0"]
        print(
            f"{name}: loss {form['loss']:.4g} ({whole['loss_ratio']:.3g} times), "
            f"gradient {form['gradient_norm']:.4g} "
            f"({whole['gradient_ratio']:.3g} times)"
        )


def measured(config, network, variables, batch: Batch, key) -> tuple:
    """(losses, gradient norms) [1 + forms] of one batch; cross-entropy is first."""
    images = parts.prepare(key, batch, config, network.scale)
    statistics = variables["batch_stats"]

    def seen(params):
        (logits, outputs), _ = parts.forward(
            network.model, params, statistics, images, "train", batch.sites
        )
        return (logits, outputs.features), outputs.class_maps

    given, pull, class_maps = jax.vjp(seen, variables["params"], has_aux=True)
    relevance = patch_relevance(of_class(class_maps, batch.labels))

    def cross_entropy(given):
        ones = jnp.ones(len(batch.labels))
        labels = batch.labels
        return losses.mixed_cross_entropy(given[0], labels, labels, ones, 0 * ones)

    def contrast(form):
        return lambda given: losses.contrastive_patch_embedding(
            given[1], relevance, num_patches=config.cpe.num_patches, **form
        )

    terms = [cross_entropy, *map(contrast, FORMS.values())]
    found = [jax.value_and_grad(lambda g, t=t: t(g).mean())(given) for t in terms]
    slopes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[s for _, s in found])
    norms = jax.lax.map(lambda slope: parts.norm(pull(slope)[0]), slopes)
    return jnp.stack([value for value, _ in found]), norms


if __name__ == "__main__":
    main()
