"""Pretrained weights as one .npz: python -m cxai_jax.models.convert says how.

python tools/convert_weights.py --model=resnet50 --source=resnet50.pth --output=r.npz
"""

from cxai_jax.models.convert import main

if __name__ == "__main__":
    main()
