"""Both CT sites pooled, one model scored per site: the paper's Tables 1 and 2.

python -m cxai_jax.main --config=configs/joint.py:full
"""

from configs import common, rows


def get_config(words: str = "full"):
    config = common.get_config()
    config.data.name = "joint"
    config.data.split = "blocked"  # Of site A; site B is always official.
    config.data.fit = "train+val"
    config.data.site_repeats = (1, 4)  # Site B four times, as Wang et al. (A21).
    return rows.apply_rows(config, words)
