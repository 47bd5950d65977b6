"""What can be told of an answer without reading it."""

from collections.abc import Iterable

import numpy as np


def response_length(response: str) -> int:
    """Characters of an answer without outer white space: the length that "the longer answer wins" goes by."""
    return len(response.strip())


def longer_wins(chosen: Iterable[str], rejected: Iterable[str]) -> float:
    """Accuracy of always preferring the answer with more characters (outer white space aside); ties count half."""
    extra = np.fromiter((response_length(a) - response_length(b) for a, b in zip(chosen, rejected, strict=True)), int)
    return float(np.mean((np.sign(extra) + 1) / 2))
