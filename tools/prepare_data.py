"""Builds a data set from image files: `cxai-prepare`, see cxai_jax/data/prepare.py.

python tools/prepare_data.py --dataset=site_b --source=DIR --data_dir=data
"""

import sys

from cxai_jax.commands import prepare

if __name__ == "__main__":
    sys.exit(prepare())
