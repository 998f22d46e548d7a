"""Writes experiments/config_fields.md: every field of configs/common.py, explained.

python -m tools.document_config

The text of a field is the comment on its line, or the comment lines right above it.
"""

import ast
import re
from pathlib import Path

from configs import common
from cxai_jax.config import flatten

SOURCE = Path(common.__file__)
TARGET = Path(__file__).parents[1] / "experiments" / "config_fields.md"
HEAD = """# What each config field means

Written by `python -m tools.document_config` from `configs/common.py`; edit there. Set a
field on the command line as `--config.train.epochs=20`. A1 to A32 and D18 are explained
in [README.md](README.md).
"""


def main() -> None:
    TARGET.write_text(document(SOURCE.read_text()), encoding="utf-8")
    print(f"{TARGET.name}: {len(explanations(SOURCE.read_text()))} fields")


def document(source: str) -> str:
    """The page as Markdown.

    Raises:
      ValueError: for a field without a comment.
    """
    defaults = flatten(common.get_config().to_dict())
    texts = explanations(source)
    silent = sorted(defaults.keys() - texts.keys())
    if silent:
        raise ValueError(
            f"configs/common.py says nothing of {', '.join(silent)}; add a comment to "
            "each line"
        )
    parts, group = [HEAD], None
    for name, text in texts.items():
        section = name.partition(".")[0] if "." in name else "run"
        if section != group:
            group = section
            parts.append(
                f"\n## {group}\n\n| field | default | meaning |\n|---|---|---|\n"
            )
        text = text.replace("|", r"\|")
        parts.append(f"| `{name}` | `{defaults[name]!r}` | {text} |\n")
    return "".join(parts)


def explanations(source: str) -> dict[str, str]:
    """Field -> its comment, for every assignment to a field in get_config."""
    lines, groups, texts = source.splitlines(), {"config": ""}, {}
    functions = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    for node in next(f for f in functions if f.name == "get_config").body:
        targets = map(ast.unparse, getattr(node, "targets", ()))
        owner, _, name = next(targets, "").partition(".")
        if not name:
            continue
        field = groups[owner] + name
        for short in targets:  # config.model = model = ConfigDict()
            groups[short] = field + "."
        if text := comment(lines, node.lineno, node.end_lineno):
            texts[field] = text
    return texts


def comment(lines: list[str], first: int, last: int) -> str:
    """The comments inside lines first..last (from 1), else those right above."""
    found = [
        re.sub(r".*?\s#\s", "", line)
        for line in lines[first - 1 : last]
        if re.search(r"\s#\s", line)
    ]
    above = first - 2
    while not found and lines[above].lstrip().startswith("#"):
        above -= 1
    found = found or [line.strip(" #") for line in lines[above + 1 : first - 1]]
    return " ".join(found)


if __name__ == "__main__":
    main()
