"""What XLA made of a program, read from its text."""

import re

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(hlo: str) -> list[list]:
    """[operation, shape] of every array that a collective of the program returns."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                dims = [int(d) for d in shape.split(",") if d]
                found.append([match[2], dims])
    return found
