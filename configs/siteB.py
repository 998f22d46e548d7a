"""COVID-CT (Zhao et al.), official split, ResNet-50: Table 2 of the CT paper.

python -m tools.prepare_data --dataset=site_b --source=DIR
python -m cxai_jax.main --config=configs/siteB.py:full
"""

from configs import common, rows


def get_config(words: str = "full"):
    config = common.get_config()
    config.data.name = "site_b"
    config.data.fit = "train+val"
    return rows.apply_rows(config, words)
