"""Settings from a JSON file, which runs nothing: other configs are Python programs.

python -m cxai_jax.main --config=FILE.json

FILE.json holds some or all fields, `{"train": {"epochs": 3.0}}`; the others are those
of configs/common.py. The `config.json` of a run is such a file.
"""

from configs import common
from cxai_jax.config import update_from_json


def get_config(path: str):
    config = common.get_config()
    update_from_json(config, path)
    return config
