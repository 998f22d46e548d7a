"""Which class is positive: the one whose sensitivity is reported.

A wrong guess swaps sensitivity with specificity, so it is made only where the names
leave one answer, and never for a class that is called like the absence of a disease.
"""

import re
from collections.abc import Sequence

# Words of a class without the disease, in lower case.
ABSENT = {"normal", "normals", "healthy", "negative", "negatives", "control"}
ABSENT |= {"controls", "no", "non", "not", "without"}
RUN_TOGETHER = re.compile("no(finding|findings)|non.+|.+negative")
FOUND = re.compile("covid|positive")


def is_negative(name: str) -> bool:
    """Whether a class is called like the absence of what is looked for."""
    spaced = re.sub("(?<=[a-z])(?=[A-Z])", " ", name)  # "NoFinding"
    words = re.findall(r"[^\W\d_]+", spaced.lower())
    return any(word in ABSENT or RUN_TOGETHER.fullmatch(word) for word in words)


def positive_class(
    class_names: Sequence[str], wanted: str = "", option: str = "--positive"
) -> int:
    """Index of the positive class.

    Args:
      class_names: K names.
      wanted: one of them, by whatever case; "" takes the only one that is not called
        normal, healthy, negative, no finding, control or "non...", or of several the
        only one called covid or positive.
      option: how `wanted` is given, for the messages.

    Raises:
      ValueError: if `wanted` is no class, or the names do not make it clear.
    """
    listed = ", ".join(class_names)
    if wanted:
        same = [i for i, name in enumerate(class_names) if name == wanted]
        same = same or [
            i
            for i, name in enumerate(class_names)
            if name.casefold() == wanted.casefold()
        ]
        if len(same) != 1:
            raise ValueError(f"{option}={wanted} is none of the classes {listed}")
        return same[0]
    candidates = [i for i, name in enumerate(class_names) if not is_negative(name)]
    if len(candidates) > 1:
        candidates = [i for i in candidates if FOUND.search(class_names[i].lower())]
    if len(candidates) != 1:
        raise ValueError(
            f"which of the classes {listed} is the positive one, whose sensitivity is "
            f"reported, is not clear; name it with {option}=CLASS"
        )
    return candidates[0]
