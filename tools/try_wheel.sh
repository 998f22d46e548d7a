#!/usr/bin/env bash
# Uses an installed wheel from an empty folder, as somebody without a clone does: a
# shortened demo, preparation of drawn images, prediction, external validation, export.
# The commands are those on PATH; tools/try_wheel.sh FOLDER leaves everything there.
set -euo pipefail
mkdir -p "$1"
cd "$1"
test -z "$(ls -A)" || { echo "$1 is not empty"; exit 2; }
unset PYTHONPATH
small=(--config=demo --config.data.image_size=32 --config.data.resize=36
  --config.data.phantom_images=80 --config.train.batch_size=8 --config.train.epochs=1
  --config.eval.batch_size=8 --config.eval.bootstrap=20 --config.tta.k=2)
cxai-train "${small[@]}" --workdir=runs/demo
python - <<'DRAW'
import numpy as np
from pathlib import Path
from PIL import Image

for number, name in enumerate(("COVID-19", "non-COVID-19")):
    Path("images", name).mkdir(parents=True)
    for i in range(6):
        drawn = np.random.default_rng([number, i]).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(drawn).save(Path("images", name, f"{i}.png"))
DRAW
cxai-prepare --dataset=folder --name=b --source=images --split=test --data_dir=data
cxai-predict --workdir=runs/demo --images images --out=predictions
cxai-train --mode=eval --on=folder:b --workdir=runs/demo
cxai-export --workdir=runs/demo --bundle=bundle
cxai-predict --model=bundle --images images --out=again
cmp predictions/predictions.csv again/predictions.csv
python -c 'import cxai_jax; assert "site-packages" in cxai_jax.__file__'
