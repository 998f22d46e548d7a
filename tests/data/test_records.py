"""Records: lazy decoding, subsets, joining, batches."""

import pickle
import time
from dataclasses import replace

import numpy as np
import pytest

from cxai_jax.data import pipeline
from cxai_jax.data.records import Dataset, Mapped, Records, concatenate, fingerprint
from cxai_jax.mesh import make_mesh


class Counted(list):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, i):
        Counted.reads += 1
        return super().__getitem__(i)


def records(n, site=0, masks=False):
    images = [np.full((4, 5, 1), 10 * site + i, np.uint8) for i in range(n)]
    return Records(
        images=images,
        labels=np.arange(n, dtype=np.int32) % 2,
        sites=np.full(n, site, np.int32),
        patients=np.array([f"p{i}" for i in range(n)]),
        names=np.array([f"{site}/{i}.png" for i in range(n)]),
        lung_masks=[np.full((4, 5), i, np.uint8) for i in range(n)] if masks else None,
    )


def test_mapped_reads_on_access_only():
    source = Counted([1, 2, 3])
    doubled = Mapped(float, source)
    assert Counted.reads == 0 and len(doubled) == 3
    assert doubled[-1] == 3.0 and Counted.reads == 1
    assert list(doubled) == [1.0, 2.0, 3.0]
    with pytest.raises(IndexError, match="item 3 of 3"):
        doubled[3]
    assert pickle.loads(pickle.dumps(doubled))[0] == 1.0


@pytest.mark.parametrize("rows", [[4, 1], np.array([4, 1]), np.arange(5) % 3 == 1])
def test_subset_keeps_the_columns_together(rows):
    part = records(5, masks=True).subset(rows)
    for i, name in enumerate(part.names):
        row = int(name[2:-4])
        assert part.images[i][0, 0, 0] == part.lung_masks[i][0, 0] == row
        assert part.patients[i] == f"p{row}" and part.labels[i] == row % 2
    assert sorted(part.names) == ["0/1.png", "0/4.png"] and part.lesion_masks is None


def test_concatenate_joins_rows_and_fills_missing_masks():
    joined = concatenate([records(2, masks=True), records(3, site=1)])
    assert joined.sites.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="an image of test is of site 1, but site_n"):
        Dataset("x", {"test": joined}, ("a", "b"), ("one",), 1, "", "")
    assert [int(image[0, 0, 0]) for image in joined.images] == [0, 1, 10, 11, 12]
    assert [mask is None for mask in joined.lung_masks] == [False] * 2 + [True] * 3
    assert joined.lesion_masks is None


def test_shapes_are_kept_where_all_parts_know_them():
    known = replace(records(3), shapes=frozenset({(4, 5, 1)}))
    wide = replace(records(2, site=1), shapes=frozenset({(4, 9, 1)}))
    assert known.subset([1]).shapes == known.shapes and records(3).shapes is None
    assert concatenate([known, wide]).shapes == {(4, 5, 1), (4, 9, 1)}
    assert concatenate([known, records(2)]).shapes is None


def test_a_split_that_does_not_fit_is_not_read_for_its_canvas():
    shapes = frozenset({(4, 9, 1), (6, 5, 1)})

    def fit(image):
        return image[:, :7]

    unread = replace(records(3), images=Mapped(None, range(3)), shapes=shapes)
    assert pipeline.decode_all(unread, fit, 3 * 6 * 7 - 1) == ((6, 7, 1), None)
    canvas, batch = pipeline.decode_all(replace(records(3), shapes=shapes), fit, 126)
    assert canvas == (6, 7, 1) and (batch.sizes[:3] == (4, 5)).all()
    np.testing.assert_array_equal(batch.images[2, :4, :5], records(3).images[2])


def test_batches_to_score_are_read_one_ahead_and_in_order():
    counted, Counted.reads = Counted(records(7).images), 0
    given = replace(records(7), images=counted)
    batches = pipeline.scoring_batches(given, lambda x: x, (4, 5, 1), 3, make_mesh())
    seen = []
    for number, (batch, rows) in enumerate(batches):
        np.testing.assert_array_equal(batch.images[: len(rows), 0, 0, 0], rows)
        np.testing.assert_array_equal(np.asarray(batch.valid), np.arange(3) < len(rows))
        read = min(6 + 3 * number, 9)
        wait_until(lambda read=read: Counted.reads == read)
        seen += rows.tolist()
    assert seen == list(range(7))
    broken = replace(records(7), images=[*records(7).images[:6], None])
    batches = pipeline.scoring_batches(broken, np.negative, (4, 5, 1), 3, make_mesh())
    with pytest.raises(TypeError):
        list(batches)


def wait_until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("threads", [0, 3])
def test_the_number_of_threads_changes_no_batch(threads):
    rows = pipeline.row_stream(np.arange(7), 3, seed=0)
    given = records(7), rows, 1, lambda x: x, (4, 5, 1), False, make_mesh()
    batches = pipeline.host_batches(*given, threads=threads)
    for step in range(1, 5):
        np.testing.assert_array_equal(next(batches).images[:, 0, 0, 0], rows[step])


def test_unequal_columns_are_refused():
    with pytest.raises(ValueError, match="equally long: .*'labels': 2"):
        Records([], np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2))


def test_fingerprint_depends_on_every_part():
    base = (["train"], ["a.png"], [0], ["f00d"])
    changed = [(["test"], *base[1:]), (base[0], ["b.png"], *base[2:])]
    changed += [(*base[:2], [1], base[3]), (*base[:3], ["beef"])]
    assert len({fingerprint(*c) for c in [base, *changed]}) == 5
    assert fingerprint(*base) == fingerprint(*base)
