"""Prompts that are nearly the same: what is trained on and evaluated with should not be."""

import itertools
import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

WORDS = 3  # of a shingle
HASHES, BANDS = 32, 8  # of a signature; at a similarity of 0.8 one of the bands agrees in 98 % of cases
SIMILARITY = 0.7  # Jaccard index of the sets of shingles, from which two prompts are nearly the same
PRIME = 2**32 + 15


def spelling(text: str) -> str:
    """A text without what people vary in it: case, Unicode form, white space, punctuation at its ends."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"^\W+|\W+$", "", plain) or plain


def signature(text: str) -> np.ndarray:
    """(HASHES,) uint64: two texts agree in as large a share of it as of their word shingles, but for chance (MinHash,
    Broder 1997, "On the resemblance and containment of documents")."""
    words = spelling(text).split()
    runs = [" ".join(words[start : start + WORDS]) for start in range(max(len(words) - WORDS + 1, 1))]
    shingles = np.array([zlib.crc32(run.encode()) for run in set(runs)], dtype=np.uint64)
    factors, shifts = np.random.default_rng(0).integers(1, 2**31, (2, HASHES)).astype(np.uint64)
    return ((shingles[:, None] * factors + shifts) % np.uint64(PRIME)).min(axis=0)


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """Indices of texts, each with that of the first other one that it is nearly the same as.

    Texts of `WORDS` words or fewer are the same or not: one word is too much of them.
    """
    known = np.array([signature(text) for text in others], dtype=np.uint64).reshape(-1, HASHES)
    places: dict[tuple[int, bytes], list[int]] = {}
    for index, band in itertools.product(range(len(known)), range(BANDS)):
        places.setdefault((band, known[index, band::BANDS].tobytes()), []).append(index)
    found = []
    for index, text in enumerate(texts):
        own = signature(text)
        candidates = {each for band in range(BANDS) for each in places.get((band, own[band::BANDS].tobytes()), [])[:10]}
        similar = [each for each in sorted(candidates) if (known[each] == own).mean() >= SIMILARITY]
        found += [(index, similar[0])] if similar else []
    return found
