"""Table 1 of the CT paper: every compared system on site A; see `tables`.

python -m experiments.table1 --list
python -m experiments.table1 --rows=baseline,sepnorm --recipe=short --size=112 \
    --backbone=lite0 --epochs=8 --seeds=0 --set data.data_dir=data
"""

from experiments import tables

if __name__ == "__main__":
    tables.main(tables.TABLE1)
