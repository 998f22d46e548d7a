"""SARS-CoV-2 CT (Soares et al.), ResNet-50: Table 1 of the CT paper.

python -m tools.prepare_data --dataset=site_a --source=DIR
python -m cxai_jax.main --config=configs/siteA.py:full
python -m cxai_jax.main --config=configs/siteA.py:full --config.data.split=random
"""

from configs import common, rows


def get_config(words: str = "full"):
    config = common.get_config()
    config.data.name = "site_a"
    config.data.split = "blocked"  # Neighbours in number are neighbours in patient.
    config.data.fit = "train+val"
    return rows.apply_rows(config, words)
