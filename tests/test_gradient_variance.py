import numpy as np
import pytest
import torch

from benchmarks import gradient_variance as gv


@pytest.fixture
def rollouts():
    """Gradients g and h of 9 rollouts with 5 parameters."""
    generator = torch.Generator().manual_seed(0)
    g, h = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator)
    return g + 2 * h, h


def test_variance_is_the_trace_of_the_covariance(rollouts):
    g, h = rollouts
    rows, sums = gv.products((a.clone(), b.clone()) for a, b in zip(g, h, strict=True))
    for baseline in (0.0, 1.3, -2.0):
        expected = np.trace(np.cov((g - baseline * h).numpy().T))
        assert gv.variance(rows, sums, baseline) == pytest.approx(expected, rel=1e-4)


def test_the_best_constant_is_the_lowest_point(rollouts):
    rows, sums = gv.products((a.clone(), b.clone()) for a, b in zip(*rollouts, strict=True))
    best = gv.best_baseline(rows, sums)
    lowest = gv.variance(rows, sums, best)
    assert all(gv.variance(rows, sums, best + step) > lowest for step in (-0.1, 0.1))
    assert lowest < gv.variance(rows, sums, 0.0) / 2


def test_the_ratio_has_an_interval_around_it(rollouts):
    rows, sums = gv.products((a.clone(), b.clone()) for a, b in zip(*rollouts, strict=True))
    result = gv.figures(rows, sums, {"none": 0.0, "mean": 2.0})
    assert result["none"]["ratio"] == 1 and result["none"]["squared_norm_ratio_interval"] == [1.0, 1.0]
    low, high = result["mean"]["squared_norm_ratio_interval"]
    share = gv.squared_norm(rows, 2.0).mean() / gv.squared_norm(rows, 0.0).mean()
    assert low < share < high
