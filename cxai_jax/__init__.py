"""Chest-imaging classifiers trained with their explanations, in JAX and Flax.

The public functions; each is imported when it is first read, so that importing the
package costs nothing.
"""

import importlib

_PUBLIC = {
    "class_activation_map": "maps.cam",
    "semantic_percent_map": "maps.cam",
    "sample_box": "objectives.mixing",
    "snapmix": "objectives.mixing",
    "mixed_cross_entropy": "objectives.losses",
    "contrastive_patch_embedding": "objectives.losses",
    "supervised_nt_xent": "objectives.losses",
    "saliency_alignment": "objectives.alignment",
    "rank_cells": "voting.rules",
    "masked_images": "voting.rules",
    "vote": "voting.rules",
    "classification_metrics": "scoring.metrics",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cxai_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cxai_jax.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
