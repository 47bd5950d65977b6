"""Intervals and tests for paired scores."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import scipy.stats

RESAMPLES = 5000  # of a bootstrap interval or a permutation test
Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
TIE = 1e-6  # rewards of one and the same input can differ by rounding, depending on its place in the batch
CHUNK_DRAWS = 2**20  # random numbers in memory at once

Groups = Sequence[Hashable] | np.ndarray  # labels, one a value


def wins(scores: np.ndarray, others: np.ndarray | float = 0.0) -> np.ndarray:
    """(N,) 1 where the score is higher than the other one, 0.5 where both are equal up to `TIE`, else 0.

    Of margins, `wins(margins)`.
    """
    margin = np.asarray(scores, float) - np.asarray(others, float)
    return np.where(np.abs(margin) <= TIE, 0.5, (margin > 0).astype(float))


def rate_interval(values: np.ndarray, groups: Groups | None = None) -> list[float] | None:
    """95 % interval of a share: `bootstrap_interval`, and Wilson's where all groups are alike, such as 12 wins of 12.

    Resamples of groups that do not differ do not either. Wilson's then takes each group as one observation.

    Args:
        values: (N,) between 0 and 1.
        groups: as for `bootstrap_interval`.
    """
    bounds = bootstrap_interval(values, groups)
    if bounds is None or bounds[1] - bounds[0] > 1e-9:
        return bounds
    return wilson_interval(float(np.mean(values)), len(group_sums(values, groups)[0]))


def wilson_interval(share: float, n: int) -> list[float]:
    """95 % score interval of a proportion in n observations (Wilson 1927); ties may count as half."""
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap_interval(values: np.ndarray, groups: Groups | None = None) -> list[float] | None:
    """95 % bootstrap interval of the mean by expanded percentiles, drawing whole groups where they are given.

    Pairs that share a prompt are not independent; drawn one by one they would make the interval too narrow
    (cluster bootstrap: Field and Welsh 2007).

    Args:
        values: (N,) floats; for a paired comparison their differences.
        groups: (N,) labels, such as prompts; by default every value is its own group.

    Returns:
        Lower and upper bound; None for fewer than two groups, which tell nothing about their spread.
    """
    sums, sizes = group_sums(values, groups)
    count = len(sums)
    if count < 2:
        return None
    tail = expanded_tail(count)
    interval = scipy.stats.bootstrap(
        (sums, sizes),  # drawn together, so that a mean is that of all values in the drawn groups
        lambda sums, sizes, axis: sums.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=1 - 2 * tail,
        n_resamples=RESAMPLES,
        batch=max(1, CHUNK_DRAWS // count),
        rng=0,
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def expanded_tail(count: int, parameters: int = 1) -> float:
    """Share of the resamples to leave out on either side of a 95 % bootstrap interval.

    2.5 % would make it too narrow for few groups: the interval of 5 normal values covers their mean in 84 % of cases.
    Resamples spread by a factor sqrt((n - p) / n) too little, and by the normal distribution where Student's is wider;
    so the percentiles move outwards by both (Hesterberg 2015, arXiv 1411.5279).

    Args:
        count: of the groups, n.
        parameters: what is fitted to them, p; a mean is one.
    """
    free = count - parameters
    return float(scipy.stats.norm.cdf(-math.sqrt(count / free) * scipy.stats.t.ppf(0.975, free)))


RIDGE = 1e-4  # of the squared slopes: covariates that always change together still have a solution


def adjusted_mean(values: np.ndarray, covariates: np.ndarray) -> tuple[float, list[float] | None]:
    """What the mean of N values would be where all covariates are 0: the intercept of a least-squares regression.

    Args:
        values: (N,), such as differences in reward between two answers to each prompt.
        covariates: (N, F), such as the differences in form between them.

    Returns:
        The intercept and its 95 % bootstrap interval over the N; None instead of the interval where N is not at least
        twice the number of parameters. A covariate that is the same for all N can not be told from the intercept.
    """
    scale = covariates.std(axis=0)
    used = scale > 0
    design = np.column_stack([np.ones(len(values)), covariates[:, used] / scale[used]])
    penalty = len(values) * RIDGE * np.diag([0.0, *np.ones(used.sum())])
    # Sums over a resample are sums over the N weighted by how often each was drawn, so that all resamples are one
    # product of matrices.
    squares = np.einsum("ni,nj->nij", design, design).reshape(len(values), -1)
    products = design * np.asarray(values)[:, None]

    def intercepts(weights: np.ndarray) -> np.ndarray:
        left = (weights @ squares).reshape(-1, design.shape[1], design.shape[1]) + penalty
        return np.linalg.solve(left, (weights @ products)[:, :, None])[:, 0, 0]

    estimate = float(intercepts(np.ones((1, len(values))))[0])
    if len(values) < 2 * design.shape[1]:
        return estimate, None
    drawn = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    tail = expanded_tail(len(values), design.shape[1])
    low, high = np.quantile(intercepts(drawn.astype(float)), [tail, 1 - tail])
    return estimate, [float(low), float(high)]


def paired_p_value(differences: np.ndarray, groups: Groups | None = None) -> float:
    """Two-sided p-value of the mean difference by a sign-flip permutation test; a group's values flip together."""
    sums, _ = group_sums(differences, groups)
    if len(sums) < 2:
        return 1.0  # one group alone can not be significant
    result = scipy.stats.permutation_test(
        (sums, np.zeros_like(sums)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, CHUNK_DRAWS // len(sums)),
        rng=0,
    )
    return float(result.pvalue)


def group_sums(values: np.ndarray, groups: Groups | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values in each group."""
    values = np.asarray(values, float)
    if groups is None:
        return values, np.ones(len(values))
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(label, len(numbers)) for label in groups], dtype=int)
    return np.bincount(group, weights=values), np.bincount(group).astype(float)


def spearman(values: np.ndarray, others: np.ndarray) -> float | None:
    """Rank correlation; None where one side is constant."""
    if np.ptp(values) == 0 or np.ptp(others) == 0:
        return None
    return float(scipy.stats.spearmanr(values, others).statistic)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; zeros count half for each side."""
    if not differences.any():
        return 1.0
    return float(scipy.stats.wilcoxon(differences, zero_method="zsplit").pvalue)
