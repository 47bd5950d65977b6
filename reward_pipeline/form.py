"""What can be told of an answer without reading it: its length, the form model, and how strong its author is.

A reward model that is no better than these has learned what good answers look like, and not to read them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special

from reward_pipeline.conversations import Response, response_text
from reward_pipeline.statistics import wins


def response_length(response: Response) -> int:
    """Characters of an answer without outer white space: the length that "the longer answer wins" goes by."""
    return len(response_text(response).strip())


def longer_wins(chosen: Iterable[Response], rejected: Iterable[Response]) -> float:
    """Accuracy of always preferring the answer with more characters (outer white space aside).

    Ties count half, as they would on average by guessing.
    """
    extra = np.fromiter((response_length(a) - response_length(b) for a, b in zip(chosen, rejected, strict=True)), int)
    return float(wins(extra).mean())


PENALTY = 1e-3  # of the squared weights of a fit, a pair: some counts are nearly the same, and some authors rare


def _fit(design: np.ndarray | scipy.sparse.csr_array) -> np.ndarray:
    """(F,) weights w that minimise the mean of -log sigmoid(d w) plus `PENALTY` |w|^2 / 2 over the rows d of a design.

    There is no intercept: a pair has no side.

    Args:
        design: (N, F), for each pair what the chosen side has more than the rejected one.
    """

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = design @ weights
        wrong = scipy.special.expit(-margins)
        value = -scipy.special.log_expit(margins).mean() + PENALTY / 2 * weights @ weights
        return value, PENALTY * weights - design.T @ wrong / design.shape[0]

    return scipy.optimize.minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x


# --- the form model --------------------------------------------------------------------------------------------------


def _matches(pattern: str) -> Callable[[str], float]:
    """log(1 + number of matches): the second bold word says less than the first one."""
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: math.log1p(len(compiled.findall(text)))


def _opens_with(pattern: str) -> Callable[[str], float]:
    compiled = re.compile(rf"\W*(?:{pattern})\b", re.IGNORECASE)
    return lambda text: float(compiled.match(text) is not None)


def _distinct_words(text: str) -> float:
    """Share of different ones among the words; of an empty text 1."""
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 1.0


# What is counted in the text of an answer. None of it says whether the answer is right, or about what was asked.
# At the start of a line no pattern may run over its end: on thousands of empty lines that would take minutes.
COUNTS: dict[str, Callable[[str], float]] = {
    "log_characters": lambda text: math.log1p(len(text)),
    "log_words": lambda text: math.log1p(len(text.split())),
    "log_lines": _matches(r"^.*\S.*$"),
    "paragraphs": _matches(r"\n\s*\n"),
    "bold": _matches(r"\*\*[^*\n]+\*\*"),
    "headings": _matches(r"^#{1,6} "),
    "bullets": _matches(r"^[ \t]*[-*•] "),
    "numbered_items": _matches(r"^[ \t]*\d+[.)] "),
    "code_fences": _matches(r"^[ \t]*```"),
    "inline_code": _matches(r"`[^`\n]+`"),
    "table_rows": _matches(r"^[ \t]*\|.*\|[ \t]*$"),
    "links": _matches(r"https?://"),
    "questions": _matches(r"\?"),
    "exclamations": _matches(r"!"),
    "commas": _matches(r","),
    "colons": _matches(r":"),
    "quotes": _matches(r"[\"“”«»]"),
    "brackets": _matches(r"\("),
    "digits": _matches(r"\d"),
    "opens_sure": _opens_with(r"sure|certainly|of course|absolutely|great"),
    "opens_here": _opens_with(r"here"),
    "opens_i": _opens_with(r"i|i'm|i’m"),
    "refuses": _matches(r"\b(?:I can(?:'|’|no)t|I(?:'|’)m sorry|I apologi[sz]e|[Aa]s an AI|unable to)\b"),
    "ends_with_a_mark": lambda text: float(text.rstrip().endswith((".", "!", "?", "…"))),
    "distinct_words": _distinct_words,
}


def form_counts(response: Response) -> np.ndarray:
    """(F,) float64, the `COUNTS` of an answer."""
    text = response_text(response).strip()
    return np.array([count(text) for count in COUNTS.values()])


def form_differences(chosen: Iterable[Response], rejected: Iterable[Response]) -> np.ndarray:
    """(N, F) counts of the chosen answers minus those of the rejected ones."""
    rows = [form_counts(a) - form_counts(b) for a, b in zip(chosen, rejected, strict=True)]
    return np.array(rows).reshape(-1, len(COUNTS))


def root_mean_squares(differences: np.ndarray) -> np.ndarray:
    """(F,) of every count, to divide it by."""
    scale = np.sqrt(np.mean(differences**2, axis=0))
    scale[scale == 0] = 1.0  # of a count that no pair differs in; its weight stays 0
    return scale


def fit_form_model(differences: np.ndarray) -> dict[str, float]:
    """Bradley-Terry logistic regression (Bradley and Terry 1952): the weight of every count.

    As `_fit` does it on the differences, each count divided by its root mean square.

    Args:
        differences: (N, F) of `form_differences`.
    """
    scale = root_mean_squares(differences)
    fitted = _fit(differences / scale) / scale
    return dict(zip(COUNTS, map(float, fitted), strict=True))


def form_scores(weights: Mapping[str, float], responses: Iterable[Response]) -> np.ndarray:
    """(N,) what the form model makes of answers; only differences between answers to one prompt have a meaning."""
    return np.array([form_margins(weights, form_counts(response)) for response in responses])


def form_margins(weights: Mapping[str, float], differences: np.ndarray) -> np.ndarray:
    """(N,) by how much the form model prefers the chosen answers, in nats of log odds, from their (N, F) differences.

    Counts that the model does not know, such as those of a later version, have no weight.
    """
    return differences @ np.array([weights.get(name, 0.0) for name in COUNTS])


# --- authors ---------------------------------------------------------------------------------------------------------


def fit_authors(chosen: Iterable[str], rejected: Iterable[str]) -> dict[str, float]:
    """Bradley-Terry model (Bradley and Terry 1952): the strength of every author, in nats of log odds with mean 0.

    As `_fit` does it on rows that hold 1 for the chosen answer's author and -1 for the other one's.

    Args:
        chosen, rejected: (N,) names of the authors of the answers; pairs with an empty one are left aside.

    Returns:
        Authors in alphabetical order; none where no pair names them.
    """
    named = [pair for pair in zip(chosen, rejected, strict=True) if all(pair)]
    if not named:
        return {}
    authors = sorted({author for pair in named for author in pair})
    place = {author: number for number, author in enumerate(authors)}
    column = [place[author] for pair in named for author in pair]
    # Sparse: authors may be thousands, and a pair has two. Those of one author on both sides add up to 0.
    entries = (np.tile([1.0, -1.0], len(named)), column, np.arange(0, len(column) + 1, 2))
    strengths = _fit(scipy.sparse.csr_array(entries, shape=(len(named), len(authors))))
    return dict(zip(authors, map(float, strengths), strict=True))


def author_margins(strengths: Mapping[str, float], chosen: Iterable[str], rejected: Iterable[str]) -> np.ndarray:
    """(N,) by how much the authors of the chosen answers are the stronger ones, in nats; NaN where one is unknown."""
    pairs = zip(chosen, rejected, strict=True)
    return np.array([strengths.get(a, math.nan) - strengths.get(b, math.nan) for a, b in pairs], dtype=float)
