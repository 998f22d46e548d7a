"""Two-site chest-CT phantoms drawn with NumPy: no download, and the truth is known.

A slice is a body ellipse with a spine, ribs, a heart and two lungs full of branching
vessels. Positives carry two to four ground-glass opacities inside the lungs. Lung
density, exposure and anatomy vary more than the opacities change the mean, so no
threshold on brightness solves the task. The sites differ in aspect, contrast, noise,
blur and place of a burnt-in mark. Lung and lesion masks are kept for the explanation
metrics.

With `phantom_mark="p"` the mark becomes a shortcut: in train and val it agrees with the
label with probability p, at test it stays independent.
"""

from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from cxai_jax.data import leakage, splits
from cxai_jax.data.records import Dataset, DatasetSpec, Records, fingerprint

SEED = 2020  # Of the whole data set, which is the same on every machine.
CLASS_NAMES = ("non-COVID-19", "COVID-19")
FRACTIONS = {"train": 0.60, "val": 0.15, "test": 0.25}
CHUNK = 32  # Slices drawn at once: 10 MB per array at short side 256.
NORMAL_LUNG, TISSUE, BONE = 0.13, 0.58, 0.92  # Gray values, 0 black to 1 white.
# Letters burnt in by the scanners: L at site 0, R at site 1.
MARKS = (
    np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]),
    np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1], [1, 0, 1]]),
)


@dataclass(frozen=True)
class Scanner:
    """What a site does to a slice; lengths are shares of the short side."""

    aspect: float
    gain: float
    offset: float
    noise: float
    blur: float
    mark_x: float


SCANNERS = (
    Scanner(aspect=1.06, gain=1.0, offset=0.0, noise=0.008, blur=0.0, mark_x=-0.72),
    Scanner(aspect=1.0, gain=0.8, offset=0.1, noise=0.014, blur=0.004, mark_x=0.72),
)
SITE_NAMES = ("phantom_0", "phantom_1")


def load(data_config: ConfigDict) -> Dataset:
    """Draws `config.data.phantom_images` slices at short side `config.data.resize`.

    Raises:
      ValueError: for fewer than 12 images (one per class, site and split), a short side
        below 16 pixels, or a mark that is no probability.
    """
    total, side = data_config.phantom_images, data_config.resize
    if total < 12:
        raise ValueError(f"config.data.phantom_images={total} must be at least 12")
    if side < 16:
        raise ValueError(f"config.data.resize={side} must be at least 16 pixels")
    agreement = _agreement(data_config.phantom_mark)
    rng = np.random.default_rng(SEED)
    # Several slices per patient, but enough patients for every split.
    slices = min(4, max(1, total // 48))
    patient = np.arange(total) // slices
    sites, labels = patient % 2, patient // 2 % 2
    patients = np.array([f"phantom-{p:04d}" for p in patient])
    names = np.array([f"{p}-{i % slices}.png" for i, p in enumerate(patients)])
    split = splits.patient_disjoint(patients, 2 * sites + labels, SEED, FRACTIONS)
    agree = rng.random(total) < np.where(split == "test", 0.5, agreement)
    marked = np.where(agree, labels, 1 - labels).astype(bool)
    images, lungs, lesions = draw(rng, side, patient, sites, labels, marked)
    everything = Records(
        images=images,
        labels=labels.astype(np.int32),
        sites=sites.astype(np.int32),
        patients=patients,
        names=names,
        lung_masks=lungs,
        lesion_masks=lesions,
    )
    digests = [leakage.pixel_digest(image) for image in images]
    thumbnails = np.stack([leakage.thumbnail(image) for image in images])
    return Dataset(
        name="phantom",
        splits={key: everything.subset(split == key) for key in FRACTIONS},
        class_names=CLASS_NAMES,
        site_names=SITE_NAMES,
        positive=1,
        split_scheme="patient-disjoint",
        fingerprint=fingerprint(split, names, labels, digests),
        leakage=leakage.examine(
            split, names, labels, patients, [""] * total, digests, thumbnails
        ),
    )


def draw(
    rng: np.random.Generator,
    side: int,
    patient: np.ndarray,
    sites: np.ndarray,
    labels: np.ndarray,
    marked: np.ndarray,
) -> tuple[list, list, list]:
    """Draws N slices; the anatomy does not depend on `side`.

    Args:
      rng: source of all randomness.
      side: pixels, short side.
      patient: int [N], slices of one patient share their anatomy.
      sites: int [N], 0 or 1.
      labels: int [N], 1 has opacities.
      marked: bool [N], True has a burnt-in mark.

    Returns:
      images uint8 [h, w, 1], lung masks and lesion masks uint8 [h, w], N of each.
    """
    anatomy = _anatomy(rng, patient, labels)
    images, lungs, lesions = ([None] * len(patient) for _ in range(3))
    for site, scanner in enumerate(SCANNERS):
        rows = np.flatnonzero(sites == site)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            part = {key: value[chunk] for key, value in anatomy.items()}
            width = round(side * scanner.aspect)
            slice_, lung, lesion = _slice(part, side, width)
            picture = _scan(rng, slice_, scanner, part)
            _burn_in(picture, lung, MARKS[site], scanner.mark_x, marked[chunk])
            for i, row in enumerate(chunk):
                images[row] = np.round(255 * picture[i]).astype(np.uint8)[..., None]
                lungs[row] = lung[i].astype(np.uint8)
                lesions[row] = lesion[i].astype(np.uint8)
    return images, lungs, lesions


def _agreement(mark: str) -> float:
    try:
        agreement = float(mark or 0.5)
    except ValueError:
        agreement = -1.0
    if not 0 <= agreement <= 1:
        raise ValueError(
            f"config.data.phantom_mark={mark!r} must be '' or a probability, e.g. '0.9'"
        )
    return agreement


def _anatomy(rng, patient: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Every random length and gray value, [N, ...], in units of half the image."""
    count, people = len(patient), patient.max() + 1

    def own(low, high, *shape):  # One draw per slice.
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    def shared(low, high, *shape):  # One draw per patient.
        return rng.uniform(low, high, (people, *shape)).astype(np.float32)[patient]

    level = own(0.8, 1.1)  # Lungs shrink towards the apex and the base.
    sides = np.array([-1, 1], np.float32)
    lung_x = sides * shared(0.40, 0.48, 1) + shared(-0.05, 0.05, 1)
    lung_y = shared(-0.12, 0.02, 1) + own(-0.04, 0.04, 2)
    radius_x = shared(0.25, 0.33, 2) * level[:, None]
    radius_y = shared(0.45, 0.60, 2) * level[:, None]
    # Branches run from the hilum outwards, thinner and fainter with every blob.
    steps = np.linspace(0.1, 0.9, 6, dtype=np.float32)
    angle = own(0, 2 * np.pi, 2, 8, 1) + own(-0.2, 0.2, 2, 8, 6)
    along = steps * own(0.7, 1.1, 2, 8, 1)
    vessel_x = lung_x[:, :, None, None] + radius_x[:, :, None, None] * along * np.cos(
        angle
    )
    vessel_y = lung_y[:, :, None, None] + radius_y[:, :, None, None] * along * np.sin(
        angle
    )
    # Up to four opacities, each in one lung, away from its centre.
    lobe = rng.integers(0, 2, (count, 4))
    angle, along = own(0, 2 * np.pi, 4), own(0.15, 0.7, 4)

    def in_lobe(values):
        return np.take_along_axis(values, lobe, axis=1)

    wanted = rng.integers(2, 5, count) * (labels == 1)
    return {
        "body": np.stack([shared(0.84, 0.95), shared(0.74, 0.88)], 1),
        "wobble": shared(-0.03, 0.03, 6),
        "lung_x": lung_x,
        "lung_y": lung_y,
        "radius_x": radius_x,
        "radius_y": radius_y,
        "heart": np.stack([shared(0.05, 0.2), shared(0.1, 0.3), level * 0.25], 1),
        "density": shared(-0.03, 0.03),
        "dependent": own(0.0, 0.04),
        "texture": own(-1, 1, 9, 9),
        "vessel_x": vessel_x.reshape(count, -1),
        "vessel_y": vessel_y.reshape(count, -1),
        "vessel_size": np.broadcast_to(0.022 - 0.012 * steps, angle.shape[:1] + (16, 6))
        .reshape(count, -1)
        .astype(np.float32),
        "vessel_gray": own(0.12, 0.3, 96),
        "lesion_x": in_lobe(lung_x) + in_lobe(radius_x) * along * np.cos(angle),
        "lesion_y": in_lobe(lung_y) + in_lobe(radius_y) * along * np.sin(angle),
        "lesion_size": own(0.14, 0.22, 4),
        "lesion_on": (np.arange(4) < wanted[:, None]).astype(np.float32),
        "lesion_gray": own(0.22, 0.30),
        "exposure": own(0.93, 1.07),
        "black": own(-0.02, 0.02),
    }


def _slice(a: dict, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Gray slice float32 [B, h, w] with its lung and lesion masks bool [B, h, w]."""
    y, x = (
        np.linspace(-1, 1, n, endpoint=False, dtype=np.float32) + 1 / n
        for n in (height, width)
    )
    soft = 2 / height  # An edge is one pixel wide.
    angle = np.arctan2(y[:, None], x[None, :])
    waves = np.stack([f(k * angle) for k in (2, 3, 4) for f in (np.cos, np.sin)])
    wobble = 1 + np.einsum("bk,khw->bhw", a["wobble"], waves)

    def ellipse(cx, cy, rx, ry):
        """Coverage of an ellipse per slice, 1 inside and 0 outside."""
        u = ((x - cx[:, None]) / rx[:, None])[:, None, :]
        v = ((y - cy[:, None]) / ry[:, None])[:, :, None]
        inside = (wobble - np.sqrt(u**2 + v**2)) * np.minimum(rx, ry)[:, None, None]
        return np.clip(0.5 + inside / soft, 0, 1)

    def blobs(cx, cy, size, gray):
        """Sum of Gaussian spots [B, n], as one product of their rows and columns."""
        rows = _gaussian((y - cy[..., None]) / size[..., None])
        columns = _gaussian((x - cx[..., None]) / size[..., None])
        return np.matmul((rows * gray[..., None]).swapaxes(1, 2), columns)

    zero, one = np.zeros(len(a["body"]), np.float32), np.ones(len(a["body"]), "f4")
    body = ellipse(zero, zero, *a["body"].T)
    lungs = [
        ellipse(a["lung_x"][:, i], a["lung_y"][:, i], *radii)
        for i, radii in enumerate(zip(a["radius_x"].T, a["radius_y"].T, strict=True))
    ]
    heart_x, heart_y, heart_radius = a["heart"].T
    heart = ellipse(heart_x, heart_y, heart_radius, 1.2 * heart_radius)
    lung = np.maximum(*lungs) * (1 - heart) * body
    # Ribs sit on the inside of the body's edge; the spine at the back has a canal.
    turn = np.linspace(0, 2 * np.pi, 14, endpoint=False, dtype=np.float32) + 0.2
    ribs = blobs(
        0.9 * a["body"][:, :1] * np.cos(turn),
        0.9 * a["body"][:, 1:] * np.sin(turn),
        np.full((len(zero), 14), 0.035, np.float32),
        np.full((len(zero), 14), BONE - TISSUE, np.float32),
    )
    back = 0.72 * a["body"][:, 1]
    spine = ellipse(zero, back, 0.14 * one, 0.13 * one)
    canal = ellipse(zero, back + 0.13, 0.05 * one, 0.05 * one)
    texture = _upsample(a["texture"], height, width)
    vessels = blobs(a["vessel_x"], a["vessel_y"], a["vessel_size"], a["vessel_gray"])
    opacity = blobs(a["lesion_x"], a["lesion_y"], a["lesion_size"], a["lesion_on"])
    opacity = np.clip(2 * opacity * (1 + 0.25 * texture) - 0.5, 0, 1)
    air = (
        NORMAL_LUNG
        + a["density"][:, None, None]
        + a["dependent"][:, None, None] * y[:, None]
        + 0.02 * texture
    )
    inner = air + vessels + a["lesion_gray"][:, None, None] * opacity
    outer = TISSUE + 0.03 * texture + ribs
    outer += (BONE - TISSUE) * spine - (BONE - 0.5) * spine * canal
    gray = lung * np.minimum(inner, 0.75) + (1 - lung) * body * outer
    return gray, lung > 0.5, (lung > 0.5) & (opacity > 0.25)


def _scan(rng, gray: np.ndarray, scanner: Scanner, a: dict) -> np.ndarray:
    """What the scanner makes of the slice, float32 [B, h, w] in 0 to 1."""
    height, width = gray.shape[1:]
    if scanner.blur:
        rows, columns = (_blur(n, scanner.blur * height) for n in (height, width))
        gray = rows @ gray @ columns.T
    gain = scanner.gain * a["exposure"][:, None, None]
    noise = scanner.noise * rng.standard_normal(gray.shape, np.float32)
    offset = scanner.offset + a["black"][:, None, None]
    return np.clip(gain * gray + offset + noise, 0, 1)


def _burn_in(picture, lung, letter, mark_x: float, marked: np.ndarray) -> None:
    """Writes the scanner's letter into an upper corner, never over a lung."""
    height, width = picture.shape[1:]
    scale = max(1, round(height / 48))
    stamp = np.kron(letter, np.ones((scale, scale))) > 0
    row = round(0.14 * height) - stamp.shape[0] // 2
    column = round((1 + mark_x) / 2 * width) - stamp.shape[1] // 2
    place = np.zeros((height, width), bool)
    place[row : row + stamp.shape[0], column : column + stamp.shape[1]] = stamp
    picture[place & ~lung & marked[:, None, None]] = 1.0


def _gaussian(distance: np.ndarray) -> np.ndarray:
    """exp(-distance^2 / 2), floored at e^-40: denormals slow products a hundredfold."""
    return np.exp(-np.minimum(distance**2 / 2, 40))


def _blur(size: int, sigma: float) -> np.ndarray:
    """Gaussian smoothing as a matrix [size, size], rows sum to 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = _gaussian((distance / max(sigma, 0.3)).astype(np.float32))
    return weights / weights.sum(1, keepdims=True)


def _upsample(coarse: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation of a coarse field [B, g, g] to [B, h, w], ends aligned."""

    def matrix(size):
        at = np.linspace(0, coarse.shape[1] - 1, size, dtype=np.float32)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(coarse.shape[1])))

    rows, columns = (matrix(size).astype(np.float32) for size in (height, width))
    return rows @ coarse @ columns.T


SPEC = DatasetSpec(load)
