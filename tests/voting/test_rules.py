"""Voting: cells, masks, rules, sweeps and the exact early exit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.voting import early_exit, rules

rank = jax.jit(rules.rank_cells, static_argnames=("grid", "k", "patch"))
votes_for = jax.jit(rules.votes_for, static_argnames=("theta", "k"))
masked = jax.jit(rules.masked_images, static_argnames=("grid", "fill"))


def two_class(original, opposing, k, theta=0.2):
    """Probabilities [1, k+1, 2] with the given number of clearly opposing votes."""
    support = np.eye(2)[original] * 0.98 + 0.01
    votes = [support] + [support[::-1]] * opposing + [support] * (k - opposing)
    return np.array(votes)[None]


def naive_labels(probs, k, theta):
    """The rules of Ali et al. Sec. 3.3 and A15, one vote at a time in float32."""
    labels = []
    for image in np.asarray(probs, np.float32):
        label = int(image[0].argmax())
        against = []
        for vote in image[1 : k + 1]:
            if len(vote) == 2 and label == 1:
                opposes = not vote[1] >= np.float32(theta)
            elif len(vote) == 2:
                opposes = not vote[1] < np.float32(1 - theta)
            else:
                opposes = np.delete(vote, label).max() >= np.float32(1 - theta)
            if opposes:
                against.append(vote)
        if len(against) > k / 2:
            means = np.mean(against, 0)
            means[label] = -1  # The rejected class cannot win.
            label = 1 - label if len(image[0]) == 2 else means.argmax()
        labels.append(int(label))
    return labels


def scene(probs, grid=6):
    """Images whose variants look themselves up: (forward, images, cells, first).

    Pixel (5, 5) of a 6x6 image holds its number and is never masked; the number of
    masked cells says which variant it is.
    """
    batch, k = probs.shape[0], probs.shape[1] - 1
    images = np.ones((batch, grid, grid, 1), np.float32)
    images[:, -1, -1, 0] = np.arange(batch) + 2
    cells = np.stack(
        [np.random.default_rng(i).permutation(35)[:k] for i in range(batch)]
    )
    table = jnp.asarray(probs, jnp.float32)

    @jax.jit
    def forward(images, rows=None):
        number = images[:, -1, -1, 0].astype(jnp.int32) - 2
        return table[number, (images == 0).sum((1, 2, 3))]

    return forward, jnp.asarray(images), jnp.asarray(cells, jnp.int32), table[:, 0]


def plan(images, cells):
    """What early exit takes of a scene."""
    return rules.plan_masks(images, cells, grid=6, fill="zero")


def test_ranked_cells_equal_a_float64_sort_of_the_resized_map():
    maps = np.random.default_rng(0).normal(size=(3, 7, 7))
    pixels = np.array(
        jax.image.resize(maps.astype(np.float32), (3, 224, 224), "linear")
    )
    sums = pixels.astype(np.float64).reshape(3, 28, 8, 28, 8).sum((2, 4))
    # The outermost two rows and columns are equal by construction; make that exact.
    sums[:, 1], sums[:, -1] = sums[:, 0], sums[:, -2]
    sums[:, :, 1], sums[:, :, -1] = sums[:, :, 0], sums[:, :, -2]
    expected = np.argsort(-sums.reshape(3, -1), axis=1, kind="stable")[:, :31]
    cells = rank(jnp.asarray(maps, jnp.float32))
    assert cells.dtype == jnp.int32
    np.testing.assert_array_equal(cells, expected)


def test_ranking_ignores_offset_and_scale():
    maps = jax.random.normal(jax.random.key(0), (2, 7, 7))
    np.testing.assert_array_equal(rank(maps), rank(3 * maps + 2))


def test_ties_go_to_the_lowest_cell():
    corner = jnp.zeros((1, 7, 7)).at[0, 6, 0].set(1.0)
    cells = rank(corner, k=5)[0].tolist()
    # The corner's 2x2 cells are equal and largest.
    assert cells[:4] == [26 * 28, 26 * 28 + 1, 27 * 28, 27 * 28 + 1]
    constant = rank(jnp.full((1, 7, 7), 0.3), k=9)
    np.testing.assert_array_equal(constant[0], np.arange(9))


def test_a_map_that_is_not_finite_has_the_order_of_a_constant_one():
    maps = jax.random.normal(jax.random.key(0), (2, 7, 7))
    broken = maps.at[0, 3, 3].set(jnp.nan).at[0, 6, 6].set(9.0)
    np.testing.assert_array_equal(rank(broken, k=5)[0], np.arange(5))
    np.testing.assert_array_equal(rank(broken, k=5)[1], rank(maps, k=5)[1])


def test_other_grids_and_too_many_cells():
    maps = jnp.zeros((1, 4, 4)).at[0, 2, 1].set(1.0)
    np.testing.assert_array_equal(rules.rank_cells(maps, grid=4, k=1, patch=16), [[9]])
    with pytest.raises(ValueError, match="k is 17, expected 1..16"):
        rules.rank_cells(maps, grid=4, k=17)


@pytest.mark.parametrize("fill", rules.FILLS)
def test_masks_are_cumulative_squares_of_the_fill_value(fill):
    images = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype(np.float32)
    cells = np.array([[5, 0, 15], [3, 2, 1]])
    got = masked(jnp.asarray(images), jnp.asarray(cells), grid=4, fill=fill)
    assert got.shape == (2, 4, 8, 12, 3)
    np.testing.assert_array_equal(got[:, 0], images)
    for b in range(2):
        value = {"min": images[b].min(), "zero": 0.0, "mean": images[b].mean()}[fill]
        expected = images[b].copy()
        for j, cell in enumerate(cells[b]):
            row, column = 2 * (cell // 4), 3 * (cell % 4)
            expected[row : row + 2, column : column + 3] = value
            np.testing.assert_allclose(got[b, j + 1], expected, rtol=1e-5)


def test_masking_refuses_a_grid_that_does_not_fit_and_an_unknown_fill():
    images, cells = jnp.ones((1, 10, 10, 1)), jnp.array([[0]])
    with pytest.raises(ValueError, match="4x4 grid does not divide images of 10x10"):
        rules.masked_images(images, cells, grid=4)
    with pytest.raises(ValueError, match="known: min, zero, mean"):
        rules.masked_images(images, cells, grid=5, fill="black")


@pytest.mark.parametrize("original", [0, 1])
@pytest.mark.parametrize("opposing", [0, 15, 16, 17, 31])
def test_paper_and_code_majorities_of_31(original, opposing):
    got = votes_for(two_class(original, opposing, 31))
    assert got.original[0] == original
    assert got.opposing[0] == opposing
    assert (got.labels[0] != original) == (opposing >= 16)
    code_flips = np.mean([0] + [1] * opposing + [0] * (31 - opposing)) > 0.5
    assert (2 * got.opposing[0] > 31 + 1) == code_flips == (opposing >= 17)


@pytest.mark.parametrize(
    ("original", "p", "opposes"),
    [(1, 0.2, False), (1, 0.19, True), (0, 0.8, True), (0, 0.79, False)],
)
def test_support_threshold_at_its_ends(original, p, opposes):
    votes = np.array([[[1 - p, p]]], np.float32)
    assert rules.opposes(votes, np.array([original]), theta=0.2)[0, 0] == opposes


def test_three_classes_flip_to_the_largest_mean_of_the_opposing_votes():
    start, against, stay = [0.8, 0.1, 0.1], [0.0, 0.05, 0.95], [0.4, 0.6, 0.0]
    probs = np.array([[start, against, against, stay]])
    assert rules.vote(probs, k=3)[0] == 2
    assert rules.vote(probs[:, [0, 1, 3, 3]], k=3)[0] == 0


def test_a_majority_against_a_class_never_returns_it():
    """Opponents that differ: each gets 0.6 in turn, the rejected class always 0.4."""
    k, theta = 31, 0.4
    turns = np.array([[0.4, 0.6, 0.0], [0.4, 0.0, 0.6]], np.float32)
    probs = np.stack([[0.9, 0.1, 0.0], *turns[np.arange(k) % 2]])[None]
    assert probs[0, 1:].mean(0).argmax() == 0  # The mean alone would keep it.
    images = np.concatenate([probs, probs[..., [1, 0, 2]], probs[..., [2, 1, 0]]])
    got = votes_for(images, theta=theta, k=k)
    np.testing.assert_array_equal(got.original, [0, 1, 2])
    np.testing.assert_array_equal(got.opposing, 31)
    np.testing.assert_array_equal(got.labels, [1, 0, 1])
    np.testing.assert_array_equal(rules.vote(images, theta=theta, k=k), got.labels)
    forward, seen, cells, first = scene(images.astype(np.float32))
    early = early_exit.vote_early(forward, plan(seen, cells), first, theta=theta)
    np.testing.assert_array_equal(early.labels, got.labels)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_votes_equal_a_slow_loop_for_every_k_and_theta(classes):
    random = np.random.default_rng(classes)
    probs = random.dirichlet(np.full(classes, 0.15), size=(60, 8)).astype(np.float32)
    flips = 0
    for k, theta in ((1, 0.2), (4, 0.1), (7, 0.2), (7, 0.5)):
        got = votes_for(probs, theta=theta, k=k)
        np.testing.assert_array_equal(got.labels, naive_labels(probs, k, theta))
        flipped = 2 * got.opposing > k
        np.testing.assert_array_equal(got.labels != got.original, flipped)
        flips += int((got.labels != got.original).sum())
    assert flips > 0


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 31, 2), {}, r"at least k \+ 1 = 32 variants"),
        ((2, 32, 1), {}, "K >= 2"),
        ((2, 32, 2), {"theta": 1.2}, r"theta is 1.2, expected 0..1"),
    ],
)
def test_impossible_votes_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        rules.vote(np.full(shape, 0.5), **options)


@pytest.mark.parametrize("classes", [2, 3])
def test_decided_is_exactly_when_no_completion_changes_the_flip(classes):
    for k in range(1, 8):
        for cast in range(k + 1):
            for opposing in range(cast + 1):
                ends = {2 * (opposing + more) > k for more in range(k - cast + 1)}
                expected = len(ends) == 1 and (
                    classes == 2 or ends == {False} or cast == k
                )
                assert early_exit.decided(opposing, cast, k, classes) == expected


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_masks_give_the_same_probabilities(chunk):
    probs = np.random.default_rng(5).dirichlet([1, 1], size=(3, 8)).astype(np.float32)
    forward, images, cells, first = scene(probs)
    sizes = []

    def counted(images):
        sizes.append(len(images))
        return forward(images)

    got = jax.jit(
        lambda images, cells, first: rules.masked_probs(
            counted, images, cells, first, grid=6, fill="zero", chunk=chunk
        )
    )(images, cells, first)
    np.testing.assert_array_equal(got, probs)
    assert max(sizes) <= max(chunk, 3)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_early_exit_equals_the_full_vote_on_every_binary_pattern(k):
    patterns = np.array(list(itertools.product([0.0, 1.0], repeat=k + 1)))
    probs = np.stack([1 - patterns, patterns], -1)
    forward, images, cells, first = scene(probs)
    got = early_exit.vote_early(forward, plan(images, cells), first, step=1)
    full = votes_for(probs, k=k)
    np.testing.assert_array_equal(got.labels, full.labels)
    np.testing.assert_array_equal(got.original, full.original)
    assert got.cast.min() == (k + 1) // 2
    assert (got.opposing <= full.opposing).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_early_exit_equals_the_full_vote_on_random_probabilities(classes):
    random = np.random.default_rng(7)
    sharp = np.full(classes, 0.1)
    probs = random.dirichlet(sharp, size=(120, 32)).astype(np.float32)
    steady = random.dirichlet(sharp, size=120).astype(np.float32)
    probs[60:, 1:] = np.where(  # Half of the images mostly agree with themselves.
        random.random((60, 31, 1)) < 0.3, probs[60:, 1:], steady[60:, None]
    )
    probs[60:, 0] = steady[60:]
    forward, images, cells, first = scene(probs)
    got = early_exit.vote_early(forward, plan(images, cells), first)
    full = votes_for(probs)
    np.testing.assert_array_equal(got.labels, full.labels)
    assert 0 < (full.labels != full.original).sum() < 120
    whole = got.cast == 31
    np.testing.assert_array_equal(got.opposing[whole], full.opposing[whole])
    assert set(got.cast) <= {16, 20, 24, 28, 31}
    assert got.forwards >= got.cast.sum()
    assert got.saved == 120 * 31 - got.forwards > 0
    if classes == 3:  # A flipped image needs every vote to choose its label.
        flipped = got.labels != got.original
        assert (got.cast[flipped] == 31).all()


def test_unanimous_images_stop_at_sixteen():
    probs = np.repeat(two_class(1, 0, 31), 4, axis=0)
    forward, images, cells, first = scene(probs)
    got = early_exit.vote_early(forward, plan(images, cells), first)
    np.testing.assert_array_equal(got.cast, 16)
    assert got.forwards == 64
    assert got.saved == 60
