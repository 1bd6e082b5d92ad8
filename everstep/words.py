"""Numbers as people read and write them."""

import re


def size_words(size_bytes: int) -> str:
    """'23.5 GiB', '8 MiB', '12 bytes'."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.4g} {unit}"
    return f"{size_bytes} bytes"


def count_words(count: int) -> str:
    """'3.38M', '1.24B', '512': three digits that matter."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def plural(count: int, noun: str) -> str:
    """'1 rank', '4 ranks'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def parse_count(text: str) -> int | None:
    """'100M' -> 100000000; 'k', 'M', 'B' and 'T' are thousands; None for what is no count."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kMBT]?)", text.strip())
    if match is None:
        return None
    factor = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[match[2]]
    return round(float(match[1]) * factor)
