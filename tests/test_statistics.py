"""Intervals and tests against hand computation, other implementations, and what they claim."""

import numpy as np
import pytest
import scipy.stats

from reward_pipeline import statistics
from reward_pipeline.statistics import bootstrap_interval, paired_p_value, rate_interval, spearman, wilcoxon_p, wins


def test_scores_apart_by_rounding_are_a_tie():
    assert wins(np.array([1.0, 2.0, 1.0 + 1e-8]), np.array([2.0, 1.0, 1.0])).tolist() == [0.0, 1.0, 0.5]


def test_the_interval_agrees_with_resampling_by_hand():
    """With many groups expanded percentiles are nearly the plain ones."""
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 5, size=300)
    groups = np.repeat(np.arange(300), sizes)
    values = generator.normal(size=300)[groups] + generator.normal(size=len(groups))
    members = [np.flatnonzero(groups == group) for group in range(300)]
    means = [
        values[np.concatenate([members[group] for group in generator.integers(0, 300, size=300)])].mean()
        for _ in range(2000)
    ]
    low, high = bootstrap_interval(values, groups)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    alone_low, alone_high = bootstrap_interval(values)
    assert high - low > 1.2 * (alone_high - alone_low)  # as if they were independent, which is too narrow


@pytest.mark.parametrize("count", [5, 8])
def test_the_interval_of_few_groups_covers_what_it_says(count, monkeypatch):
    """Plain percentiles cover 0.84 of the true means with five."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        low, high = bootstrap_interval(generator.normal(size=count))
        covered.append(low <= 0 <= high)
    assert 0.9 < np.mean(covered) < 0.975


def test_a_rate_without_spread_has_the_interval_of_its_groups():
    groups = np.repeat(np.arange(6), 2)
    half = np.tile([1.0, 0.0], 6)  # one of two right at every prompt
    for values, right in ((np.ones(12), 6), (half, 3)):
        wilson = scipy.stats.binomtest(right, 6).proportion_ci(0.95, method="wilson")
        assert rate_interval(values, groups) == pytest.approx([wilson.low, wilson.high], abs=1e-6)
    some = np.array([1.0, 0.0, 1.0, 1.0])
    assert rate_interval(some) == bootstrap_interval(some)
    assert rate_interval(np.ones(2), ["a", "a"]) is None


def test_groups_are_drawn_as_a_whole():
    values = np.random.default_rng(1).normal(size=200)
    repeated = bootstrap_interval(np.repeat(values, 5), np.repeat(np.arange(200), 5))
    assert repeated == pytest.approx(bootstrap_interval(values))
    assert bootstrap_interval(np.array([3.0, 4.0]), ["a", "a"]) is None  # one prompt tells nothing about others


def test_chunks_bound_the_memory_and_change_nothing(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_interval(values)
    sizes = []

    def bootstrap(*args, batch, real=scipy.stats.bootstrap, **options):
        sizes.append(batch)
        return real(*args, batch=batch, **options)

    monkeypatch.setattr(scipy.stats, "bootstrap", bootstrap)
    monkeypatch.setattr(statistics, "CHUNK_DRAWS", 1000)
    assert bootstrap_interval(values) == whole
    assert sizes == [20]


def test_one_prompt_alone_is_never_significant():
    assert paired_p_value(np.array([1.0, 2.0, 3.0]), ["same"] * 3) == 1.0
    assert paired_p_value(np.array([1.0, 2.0, 3.0])) == 0.25  # 2 of 8 signs are as extreme


def test_rank_tests_without_spread():
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None
    assert wilcoxon_p(np.zeros(5)) == 1.0
    differences = np.array([1.0, 2.0, -3.0, 4.0, 5.0, 0.5])
    assert wilcoxon_p(differences) == pytest.approx(wilcoxon_p(-differences))


# --- adjusted means --------------------------------------------------------------------------------------------------


def test_an_adjusted_mean_is_the_intercept_of_least_squares():
    generator = np.random.default_rng(1)
    covariates = generator.normal(1, [1, 5, 0.01], (80, 3))
    values = 0.7 + covariates @ [2, -1, 0.3] + generator.normal(0, 0.1, 80)
    expected = np.linalg.lstsq(np.column_stack([np.ones(80), covariates]), values, rcond=None)[0][0]
    estimate, interval = statistics.adjusted_mean(values, covariates)
    assert estimate == pytest.approx(expected, abs=0.01) and abs(values.mean() - 0.7) > 0.5
    assert interval[0] < 0.7 < interval[1]


def test_without_covariates_that_differ_it_is_the_mean():
    values = np.random.default_rng(0).normal(0.3, 1, 50)
    estimate, interval = statistics.adjusted_mean(values, np.zeros((50, 4)))
    assert estimate == pytest.approx(values.mean()) and interval == pytest.approx(
        statistics.bootstrap_interval(values), abs=0.03
    )


def test_too_few_values_have_no_adjusted_interval():
    values, covariates = np.arange(7.0), np.random.default_rng(0).normal(size=(7, 3))
    assert statistics.adjusted_mean(values, covariates)[1] is None
    assert statistics.adjusted_mean(np.arange(8.0), np.random.default_rng(0).normal(size=(8, 3)))[1] is not None


def test_adjusted_intervals_cover_the_truth(monkeypatch):
    """Of 60 values with 8 covariates, some of them rarely other than 0."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    generator, covered = np.random.default_rng(3), 0
    for _ in range(300):
        covariates = generator.normal(0.5, 1, (60, 8)) * (generator.random((60, 8)) < 0.3)
        values = 0.4 + covariates @ np.linspace(-1, 1, 8) + generator.normal(0, 1, 60)
        low, high = statistics.adjusted_mean(values, covariates)[1]
        covered += low < 0.4 < high
    assert 0.92 < covered / 300 < 0.985
