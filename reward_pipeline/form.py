"""What can be told of an answer without reading it."""

from collections.abc import Iterable

import numpy as np

from reward_pipeline.conversations import Response, response_text


def response_length(response: Response) -> int:
    """Characters of an answer without outer white space: the length that "the longer answer wins" goes by."""
    return len(response_text(response).strip())


def longer_wins(chosen: Iterable[Response], rejected: Iterable[Response]) -> float:
    """Accuracy of always preferring the answer with more characters (outer white space aside).

    Ties count half, as they would on average by guessing.
    """
    extra = np.fromiter((response_length(a) - response_length(b) for a, b in zip(chosen, rejected, strict=True)), int)
    return float(np.mean((np.sign(extra) + 1) / 2))
