"""Your own images, prepared from class folders or a labels.csv.

cxai-prepare --dataset=folder --name=mine --source=images --data_dir=data
cxai-train --config=folder --config.data.name=folder:mine --workdir=runs/mine

The default rows fine-tune a small pretrained network within a laptop's means; `full`
alone is the paper's ResNet-50 and budget.
"""

from configs import common, rows


def get_config(words: str = "full,lite0,short"):
    config = common.get_config()
    config.data.name = "folder"
    # Validation is held out: it buys calibration and operating points.
    config.data.fit = "train"
    # Left and right change places in half of the images. That doubles few data, and
    # most findings look alike on either side; turn it off where the side is the
    # finding (dextrocardia, a side marker's letter, classes "left" and "right").
    config.augment.hflip = True
    config.augment.vflip = False  # Nobody is radiographed upside down.
    return rows.apply_rows(config, words)
