"""One file with a trained model: `cxai-export`, see cxai_jax/inference/export.py.

python -m tools.export_model --workdir=runs/b --out=model.bin [--votes=31] [--site=A]
"""

import sys

from cxai_jax.commands import export

if __name__ == "__main__":
    sys.exit(export())
