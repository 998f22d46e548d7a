"""What the alignment loss costs: FLOPs of a train step against plain cross-entropy.

XLA's count of the compiled step on shapes alone, so the machine does not matter and
nothing is run. Expected of a ResNet (alignment.md 3.5): 1.07 to 1.21 for CAM and
Grad-CAM, 2.0 to 2.2 with the input gradient. More means that the saliency branch no
longer shares the forward pass.

python -m experiments.alignment_cost

Results go to experiments/results/alignment_cost.json.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import cxr
from cxai_jax import methods, models
from cxai_jax.data.augment import Scale
from cxai_jax.methods.method import Network
from cxai_jax.training.optimizer import make_optimizer
from cxai_jax.training.results import versions
from cxai_jax.types import Batch
from cxai_jax.writer import write_json

RESULTS = Path(__file__).parent / "results"
OBJECTIVES = {
    "cross-entropy": ("baseline", {}),
    "alignment of weight 0": ("full", {"align.weight": 0.0}),
    "cheap, alpha stopped": ("cheap", {"align.alpha_grad": "stop"}),
    "cheap": ("cheap", {}),
    "full": ("full", {}),
    "full, input gradient of half": ("full", {"align.input_grad_fraction": 0.5}),
    "full, input gradient of a quarter": ("full", {"align.input_grad_fraction": 0.25}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=tuple(models.MODELS))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    rows = {}
    for name in OBJECTIVES:
        step = lowered_step(
            name, options.model, options.image_size, options.batch_size
        ).compile()
        flops = step.cost_analysis()["flops"]
        plain = rows["cross-entropy"]["flops"] if rows else flops
        temporary = step.memory_analysis().temp_size_in_bytes
        rows[name] = {
            "flops": flops,
            "ratio": flops / plain,
            "temporary_bytes": temporary,
        }
        print(f"{name:<36} x{flops / plain:.3f}  {temporary / 2**20:6.0f} MiB")
    write_json(
        RESULTS / "alignment_cost.json",
        {**vars(options), "versions": versions(), "objectives": rows},
    )


def lowered_step(
    objective: str, model_name: str, image_size: int, batch_size: int
) -> jax.stages.Lowered:
    """The whole train step, optimiser included, of a key of OBJECTIVES."""
    row, changes = OBJECTIVES[objective]
    config = cxr.get_config(row)
    config.model.name = model_name
    config.data.image_size = image_size
    config.augment.crop = "none"
    config.update_from_flattened_dict(changes)
    # XLA's own lowering on every backend, so that the count is the algorithm's.
    model = models.build(config.model, 2).clone(lowering="xla")
    optimizer = make_optimizer(
        config.optim, 100, lambda params: jax.tree.map(lambda _: "fresh", params)
    )
    scale = Scale(*models.normalisation(model_name))
    method = methods.build(
        config, Network(model, {}, scale), optimizer, total_steps=100
    )

    def arguments():
        key, side = jax.random.key(0), image_size
        variables = model.init(key, jnp.zeros((1, side, side, 3)), "eval")
        batch = Batch(
            images=jnp.zeros((batch_size, side, side, 1), jnp.uint8),
            sizes=jnp.zeros((batch_size, 2), jnp.int32),
            labels=jnp.zeros(batch_size, jnp.int32),
            sites=jnp.zeros(batch_size, jnp.int32),
            valid=jnp.ones(batch_size, bool),
        )
        return method.init(key, variables), {"labelled": batch}, key

    return jax.jit(method.step).lower(*jax.eval_shape(arguments))


if __name__ == "__main__":
    main()
