"""SnapMix against the published outputs and float64 loops, and the whole table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.maps import cam as cams
from cxai_jax.objectives import mixing
from cxai_jax.objectives.mixing import MIXES, draw, paste, sample_box, snapmix, taps

REFERENCE = Path(__file__).parents[3] / "shared/reference/snapmix_visible.npz"
OPTIONS = dict(prob=1.0, beta=1.0, same_class="double", boxes="batch", groups=1)


def naive_paste(image, donor, dst, src):
    """Bilinear, corners aligned, one pixel at a time in float64."""
    out = image.astype(np.float64).copy()
    rows, columns = dst[2] - dst[0], dst[3] - dst[1]
    high, wide = src[2] - src[0], src[3] - src[1]
    for i in range(rows):
        y = src[0] + (i * (high - 1) / (rows - 1) if rows > 1 else 0)
        y0, y1 = int(y), min(int(y) + 1, src[2] - 1)
        for j in range(columns):
            x = src[1] + (j * (wide - 1) / (columns - 1) if columns > 1 else 0)
            x0, x1 = int(x), min(int(x) + 1, src[3] - 1)
            top = donor[y0, x0] * (1 - x + x0) + donor[y0, x1] * (x - x0)
            low = donor[y1, x0] * (1 - x + x0) + donor[y1, x1] * (x - x0)
            out[dst[0] + i, dst[1] + j] = top * (1 - y + y0) + low * (y - y0)
    return out


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 12, 16, 3)).astype(np.uint8)
    maps = random.normal(size=(4, 3, 4)).astype(np.float32)
    return jnp.asarray(images), jnp.array([0, 1, 1, 0]), jnp.asarray(maps)


SWAP = jnp.array([3, 2, 0, 1])  # Same class for rows 0 and 1, not for 2 and 3.
BOX_A, BOX_B = jnp.array([2, 3, 9, 14]), jnp.array([0, 6, 12, 11])
mix = jax.jit(snapmix, static_argnames="same_class")
run_paste = jax.jit(paste)
run_mix = jax.jit(
    lambda name, key, images, labels, maps, options: MIXES[name](
        key, images, labels, maps, **dict(options)
    ),
    static_argnums=(0, 5),
)


def random_mix(name, key, batch, **options):
    return run_mix(name, key, *batch, tuple((OPTIONS | options).items()))


@pytest.mark.skipif(not REFERENCE.exists(), reason="../shared is absent")
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_snapmix_reproduces_the_published_implementation(case):
    with np.load(REFERENCE) as archive:
        given = {
            name.removeprefix(f"{case}/"): archive[name]
            for name in archive.files
            if name.startswith(f"{case}/")
        }
    size = given["images"].shape[1]
    class_map = cams.class_activation_map(
        given["features"], given["kernel"], given["labels"]
    )
    np.testing.assert_allclose(
        cams.semantic_percent_map(class_map, size), given["spm"], atol=1e-7
    )
    got = mix(
        given["images"],
        given["labels"],
        class_map,
        permutation=given["permutation"],
        box_dst=given["box_dst"],
        box_src=given["box_src"],
    )
    np.testing.assert_allclose(got.images, given["mixed"], atol=1e-4)
    np.testing.assert_array_equal(got.labels_a, given["labels"])
    np.testing.assert_array_equal(got.labels_b, given["labels_b"])
    np.testing.assert_allclose(got.weight_a, given["weight_a"], atol=2e-6)
    np.testing.assert_allclose(got.weight_b, given["weight_b"], atol=2e-6)


@pytest.mark.parametrize(
    ("dst", "src"),
    [
        ((2, 3, 9, 14), (0, 6, 12, 11)),  # shrinks and stretches
        ((5, 5, 6, 6), (1, 2, 10, 12)),  # one destination pixel
        ((0, 0, 12, 16), (4, 7, 5, 8)),  # one source pixel
        ((3, 0, 4, 16), (2, 2, 7, 3)),  # one row from one column
        ((1, 2, 8, 9), (1, 2, 8, 9)),  # unscaled
        ((4, 4, 4, 9), (1, 2, 8, 9)),  # empty destination
    ],
)
def test_paste_equals_a_per_pixel_loop(batch, dst, src):
    images = np.asarray(batch[0])
    dsts, srcs = (jnp.broadcast_to(jnp.array(box), (4, 4)) for box in (dst, src))
    got = run_paste(batch[0], batch[0][SWAP], dsts, srcs)
    assert got.dtype == jnp.float32
    for i, donor in enumerate(SWAP):
        expected = naive_paste(images[i], images[donor].astype(float), dst, src)
        np.testing.assert_allclose(got[i], expected, atol=1e-4)


def test_taps_stay_inside_the_source():
    low, high, share = taps(jnp.array([3, 200]), jnp.array([10, 224]), 224)
    inside = slice(3, 200)
    assert low[3] == 10
    assert low[199] == high[199] == 223
    assert (high[inside] <= 223).all()
    assert (share[inside] >= 0).all()
    assert (share[inside] < 1).all()


@pytest.mark.parametrize("same_class", ["double", "interp"])
def test_weights_are_box_shares_of_the_percent_map(batch, same_class):
    got = mix(
        *batch, permutation=SWAP, box_dst=BOX_A, box_src=BOX_B, same_class=same_class
    )
    percent = np.asarray(cams.semantic_percent_map(batch[2], (12, 16)), np.float64)
    alone_a = 1 - percent[:, 2:9, 3:14].sum((1, 2))
    alone_b = percent[np.asarray(SWAP)][:, 0:12, 6:11].sum((1, 2))
    expected_a, expected_b = alone_a.copy(), alone_b.copy()
    if same_class == "double":
        expected_a[:2] = expected_b[:2] = (alone_a + alone_b)[:2]
    np.testing.assert_allclose(got.weight_a, expected_a, atol=1e-6)
    np.testing.assert_allclose(got.weight_b, expected_b, atol=1e-6)
    np.testing.assert_array_equal(got.labels_b, [0, 1, 0, 1])


def test_constant_maps_fall_back_to_the_area_of_the_destination(batch):
    images, labels, maps = batch
    options = dict(permutation=SWAP, box_dst=BOX_A, box_src=BOX_B)
    area = 7 * 11 / (12 * 16)
    healthy = mix(images, labels, maps, same_class="interp", **options)
    # Image 3 has no map: it is its own row 3 and the donor of row 0 (same class).
    maps = maps.at[3].set(0.7)
    interp = mix(images, labels, maps, same_class="interp", **options)
    np.testing.assert_allclose(interp.weight_b[0], area, rtol=1e-6)
    np.testing.assert_allclose(interp.weight_a[0], healthy.weight_a[0], rtol=1e-6)
    np.testing.assert_allclose(interp.weight_a[3], 1 - area, rtol=1e-6)
    np.testing.assert_allclose(interp.weight_b[3], healthy.weight_b[3], rtol=1e-6)
    double = mix(images, labels, maps, same_class="double", **options)
    np.testing.assert_allclose(double.weight_a[0], 1 - area, rtol=1e-6)
    np.testing.assert_allclose(double.weight_b[0], area, rtol=1e-6)
    np.testing.assert_allclose(double.weight_a[3], 1 - area, rtol=1e-6)


@pytest.mark.parametrize("empty", ["box_dst", "box_src"])
def test_an_empty_box_changes_nothing(batch, empty):
    boxes = {"box_dst": BOX_A, "box_src": BOX_B} | {empty: jnp.array([3, 4, 3, 9])}
    got = mix(*batch, permutation=SWAP, **boxes)
    np.testing.assert_array_equal(got.images, batch[0])
    np.testing.assert_array_equal(got.weight_a, np.ones(4))
    np.testing.assert_array_equal(got.weight_b, np.zeros(4))


def test_boxes_per_image_equal_single_calls(batch):
    boxes_a = jnp.array([[2, 3, 9, 14], [0, 0, 1, 1], [5, 5, 5, 9], [0, 0, 12, 16]])
    boxes_b = boxes_a[::-1]
    together = mix(*batch, permutation=SWAP, box_dst=boxes_a, box_src=boxes_b)
    for i in range(4):
        alone = mix(*batch, permutation=SWAP, box_dst=boxes_a[i], box_src=boxes_b[i])
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole[i], part[i])


def test_a_batch_of_one_mixes_with_itself(batch):
    one = [x[:1] for x in batch]
    got = mix(*one, permutation=jnp.array([0]), box_dst=BOX_A, box_src=BOX_A)
    np.testing.assert_array_equal(got.images, one[0])
    np.testing.assert_allclose(got.weight_a, 1, atol=1e-6)
    np.testing.assert_allclose(got.weight_b, 1, atol=1e-6)


def test_grouped_permutation_equals_the_same_global_one(batch):
    boxes = dict(box_dst=BOX_A, box_src=BOX_B)
    grouped = mix(*batch, permutation=jnp.array([[1, 0], [1, 0]]), **boxes)
    whole = mix(*batch, permutation=jnp.array([1, 0, 3, 2]), **boxes)
    for left, right in zip(grouped, whole, strict=True):
        np.testing.assert_array_equal(left, right)


def test_weights_carry_no_gradient(batch):
    def total(maps):
        got = snapmix(*batch[:2], maps, permutation=SWAP, box_dst=BOX_A, box_src=BOX_B)
        return (got.weight_a + got.weight_b).sum()

    assert not np.any(jax.jit(jax.grad(total))(batch[2]))


def test_sampled_boxes_have_the_published_mean_area():
    def area(key):
        key_lam, key_box = jax.random.split(key)
        box = sample_box(key_box, jax.random.uniform(key_lam), 224)
        return (box[2] - box[0]) * (box[3] - box[1]) / 224**2, box

    keys = jax.random.split(jax.random.key(0), 100_000)
    areas, boxes = jax.jit(jax.vmap(area))(keys)
    np.testing.assert_allclose(areas.mean(), 0.3185, atol=0.005)
    assert boxes.dtype == jnp.int32
    assert boxes.min() >= 0
    assert boxes.max() <= 224
    assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_sampled_boxes_at_both_ends_of_lambda():
    key = jax.random.key(1)
    row0, col0, row1, col1 = sample_box(key, 1.0, 20)
    assert row0 == row1
    assert col0 == col1
    box = sample_box(key, 0.0, (20, 30))
    assert box[2] - box[0] >= 10  # Half a side either way, cut at one border at most.
    assert box[2] <= 20
    assert 15 <= box[3] - box[1] <= 30


@pytest.mark.parametrize("name", MIXES)
def test_every_mix_follows_its_permutation_and_weights(batch, name):
    images, labels, _ = batch
    got = random_mix(name, jax.random.key(3), batch)
    assert got.images.dtype == got.weight_a.dtype == got.weight_b.dtype == jnp.float32
    assert sorted(got.permutation.tolist()) == [0, 1, 2, 3]
    np.testing.assert_array_equal(got.labels_a, labels)
    np.testing.assert_array_equal(got.labels_b, labels[got.permutation])
    if name != "snapmix":
        np.testing.assert_allclose(got.weight_a + got.weight_b, 1, atol=1e-6)
    if name in ("none", "cutout"):
        np.testing.assert_array_equal(got.weight_a, 1)
    changed = np.asarray(got.images != images)
    if name == "cutout":
        assert not np.asarray(got.images)[changed].any()
    if name == "cutmix":
        donors = np.asarray(images)[np.asarray(got.permutation)]
        np.testing.assert_array_equal(np.asarray(got.images)[changed], donors[changed])
    if name == "mixup":
        share = np.asarray(got.weight_a)[:, None, None, None]
        donors = np.asarray(images, float)[np.asarray(got.permutation)]
        expected = share * np.asarray(images, float) + (1 - share) * donors
        np.testing.assert_allclose(got.images, expected, atol=1e-4)
    if name != "snapmix":
        assert len(np.unique(got.weight_a)) == 1


def test_boxes_per_sample_are_drawn_for_every_image(batch):
    got = random_mix("cutmix", jax.random.key(3), batch, boxes="sample")
    assert len(np.unique(got.weight_a)) == 4


def test_beta_shapes_lambda():
    options = OPTIONS | {"beta": 5.0, "boxes": "sample"}
    del options["same_class"]
    lam = jax.jit(lambda key: draw(key, 2000, **options).lam)(jax.random.key(6))
    # Beta(5, 5) has the standard deviation sqrt(25 / (100 * 11)) = 0.151.
    np.testing.assert_allclose(lam.mean(), 0.5, atol=0.015)
    np.testing.assert_allclose(lam.std(), 0.151, atol=0.01)


@pytest.mark.parametrize("name", ["snapmix", "as_cutmix", "mixup", "cutout"])
def test_probability_zero_leaves_the_batch(batch, name):
    got = random_mix(name, jax.random.key(4), batch, prob=0.0)
    np.testing.assert_array_equal(got.images, batch[0])
    np.testing.assert_array_equal(got.labels_b, batch[1])
    np.testing.assert_array_equal(got.weight_a, np.ones(4))
    np.testing.assert_array_equal(got.weight_b, np.zeros(4))


def test_cutout_leaves_the_lung_mask():
    images = jnp.ones((8, 16, 16, 4))
    labels = jnp.zeros(8, jnp.int32)
    options = {"prob": 1.0, "beta": 1.0, "same_class": "double", "groups": 1}
    mixed = mixing.MIXES["cutout"](
        jax.random.key(0), images, labels, None, boxes="sample", **options
    )
    assert (mixed.images[..., :3] == 0).any()
    np.testing.assert_array_equal(mixed.images[..., 3], 1)


def test_probability_is_per_batch():
    images, labels, maps = (
        jnp.ones((2, 4, 4, 1)),
        jnp.array([0, 1]),
        jnp.ones((2, 1, 1)),
    )
    images = images.at[1].set(0.0)
    keys = jax.random.split(jax.random.key(5), 400)
    options = OPTIONS | {"prob": 0.25}
    weights = jax.jit(
        jax.vmap(lambda key: MIXES["mixup"](key, images, labels, maps, **options)[3])
    )(keys)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert 0.17 < (weights[:, 0] < 1).mean() < 0.33  # 3.7 standard deviations


@pytest.mark.parametrize(
    ("given", "batch", "devices", "groups", "warns"),
    [
        (0, 64, 1, 1, False),
        (0, 64, 8, 8, False),  # Shards of 8: every image stays on its device.
        (0, 32, 8, 4, False),  # Shards of 4 are paired two by two.
        (0, 16, 8, 2, False),
        (0, 36, 6, 3, False),
        (0, 8, 8, 1, False),
        (0, 4, 2, 1, True),
        (8, 32, 1, 8, True),
        (2, 32, 8, 2, False),
    ],
)
def test_groups_hold_eight_images_on_any_number_of_devices(
    given, batch, devices, groups, warns, caplog
):
    assert mixing.group_count(given, batch, devices) == groups
    assert ("of fewer than 8 images" in caplog.text) == warns


def test_groups_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="config.mix.groups=5 does not divide the 32"):
        mixing.group_count(5, 32, 1)


def test_partners_stay_in_their_group(batch):
    got = [
        random_mix("cutmix", jax.random.key(i), batch, groups=2).permutation // 2
        for i in range(8)
    ]
    np.testing.assert_array_equal(got, [[0, 0, 1, 1]] * 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "groups is 3, it must divide the batch of 4"),
        ({"boxes": "image"}, "known: batch, sample"),
        ({"same_class": "triple"}, "known: double, interp"),
        ({"prob": 1.5}, "expected 0 <= prob <= 1"),
        ({"beta": 0.0}, "beta > 0"),
    ],
)
def test_impossible_settings_are_refused(batch, options, message):
    with pytest.raises(ValueError, match=message):
        random_mix("snapmix", jax.random.key(0), batch, **options)


def test_a_map_of_another_batch_is_refused(batch):
    images, labels, maps = batch
    with pytest.raises(ValueError, match="with B = 4"):
        snapmix(
            images, labels, maps[:2], permutation=SWAP, box_dst=BOX_A, box_src=BOX_B
        )


SHARDED = """
import json, math, re
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from cxai_jax.objectives.mixing import MIXES

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
labels, maps = jnp.arange(16) % 2, jax.random.normal(jax.random.key(1), (16, 4, 4))

def mixer(name, groups):
    return lambda images, labels, maps: MIXES[name](
        jax.random.key(2), images, labels, maps, prob=1.0, beta=1.0,
        same_class="double", boxes="batch", groups=groups)

def compiled(run):
    run = jax.jit(run, in_shardings=rows, out_shardings=rows)
    return run.lower(images, labels, maps).compile()

def largest_moved(program):
    # Elements of the largest array that a collective hands to another device.
    kinds = "all-gather|all-to-all|all-reduce|collective-permute"
    shapes = re.findall(rf"= (.*?) (?:{kinds})", program.as_text())
    dims = [d for shape in shapes for d in re.findall(r"\\w+\\[([0-9,]*)\\]", shape)]
    return max([math.prod(map(int, filter(None, d.split(",")))) for d in dims] or [0])

run = mixer("snapmix", 8)
sharded = compiled(run)
one = jax.jit(run)(images, labels, maps)
many = sharded(*(jax.device_put(x, rows) for x in (images, labels, maps)))
gap = max(float(abs(a - b).max()) for a, b in zip(one, many))
print(json.dumps({
    "grouped": largest_moved(sharded),
    "pooled": largest_moved(compiled(mixer("cutmix", 1))),
    "gap": gap,
    "devices": jax.device_count(),
}))
"""


@pytest.mark.slow  # Two programs are partitioned over 8 devices: 30 s of compilation.
def test_no_image_crosses_devices_when_groups_are_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["gap"] < 1e-5
    # Without groups whole batches are gathered; with them not one image is.
    assert found["pooled"] >= 32 * 32 * 3 > found["grouped"]
