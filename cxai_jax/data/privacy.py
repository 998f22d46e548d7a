"""Patient ids do not leave a run as they came: pages and tables hold pseudonyms.

A pseudonym says which images belong together and no more. Whoever has a list of the ids
can recompute it: it is no anonymity, and the file names stay what they are.
"""

import hashlib

LETTERS = 16  # Of the hexadecimal hash: 64 bits.


def pseudonym(patient: str, salt: str) -> str:
    """A short name that is the same for the same patient and salt; "" for "".

    Args:
      patient: the id.
      salt: differs from data set to data set, so that pages cannot be joined; "" in
        prepared data, where a patient is one in all sets.
    """
    if not patient:
        return ""
    digest = hashlib.sha256(f"{salt}\0{patient}".encode("utf-8", "surrogatepass"))
    return f"patient-{digest.hexdigest()[:LETTERS]}"
