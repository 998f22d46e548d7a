"""The scored images with their class maps: pictures, captions, galleries by kind."""

import numpy as np

from cxai_jax.data.records import Records
from cxai_jax.report import page, pictures, scores

EXAMPLES = 4  # Pictures per kind: certain and right of a class, wrong, flipped.
PICTURE = 256  # Pixels high.


class Drawn:
    """The scored images with the class maps of their predicted class, on one scale.

    `after` holds the labels after voting.
    """

    def __init__(self, predictions: dict, after, records: Records, names, scale: float):
        self.scale, self._records, self._after = scale, records, after
        self._predictions, self._names = predictions, names
        labels = predictions["probs"][:, 0].argmax(1)
        self._maps = pictures.evidence(predictions["class_maps"], labels)

    def pair(self, i: int, height: int) -> tuple[bytes, bytes]:
        """JPEG files of image and overlay, at most `height` pixels high."""
        gray = pictures.shrink(self._records.images[int(i)][..., 0], height)
        overlaid = pictures.overlay(gray, self._maps[i], self.scale)
        return pictures.encode(gray, "JPEG"), pictures.encode(overlaid, "JPEG")

    def figure(self, i: int) -> str:
        """The picture with its caption, and a warning where the map looks elsewhere."""
        probs = self._predictions["probs"][i, 0]
        caption = (
            f"{self._predictions['names'][i]}: true "
            f"{self._names[self._predictions['labels'][i]]}, predicted "
            f"{self._names[probs.argmax()]} ({scores.percent(probs.max())})"
        )
        if self._after[i] != probs.argmax():
            caption += f", after voting {self._names[self._after[i]]}"
        return page.pictured(*self.pair(i, PICTURE), caption, self.warning(i))

    def warning(self, i: int) -> str:
        """Where most of the evidence lies, if not where it should; else ""."""
        masks, i = self._records.lung_masks, int(i)
        lungs = None if masks is None else masks[i]
        if lungs is not None:
            share = pictures.share_outside(
                self._maps[i], np.asarray(lungs, bool), self.scale
            )
            return page.looks_outside(share, "the lungs")
        inside = pictures.body(self._records.images[i][..., 0])
        share = pictures.share_outside(self._maps[i], inside, self.scale)
        return page.looks_outside(share, "the body")


def galleries(drawn: Drawn, probs, labels, before, after, names, raw) -> list[str]:
    """Certain and right of each class, wrong by certainty, flipped by voting."""
    by_certainty = np.argsort(-probs.max(1), kind="stable")
    right = (before == labels)[by_certainty]
    kinds = {
        f"Certain and right: {name}": by_certainty[
            right & (labels[by_certainty] == label)
        ]
        for label, name in enumerate(names)
    }
    kinds["Wrong, the most certain first"] = by_certainty[~right]
    kinds["Flipped by voting"] = np.flatnonzero(after != before)
    return [
        page.section(
            kind,
            f"<p>{min(len(rows), EXAMPLES)} of {len(rows)} images{raw}.</p>",
            '<div class="gallery">',
            *map(drawn.figure, rows[:EXAMPLES]),
            "</div>",
        )
        for kind, rows in kinds.items()
        if len(rows)
    ]
