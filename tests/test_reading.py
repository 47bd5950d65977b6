"""With what a pair is checked, to see whether a reward model reads."""

import numpy as np
import pytest

from reward_pipeline import reading


@pytest.fixture(params=range(20))
def drawn(request):
    """Prompts and lengths of up to 40 pairs, with repetitions; one prompt in four has many of them."""
    generator = np.random.default_rng(request.param)
    n = generator.integers(2, 40)
    prompt_key = np.where(generator.random(n) < request.param % 4 / 4, 99, generator.integers(0, 10, n))
    prompt_key[:2] = 0, 1
    return prompt_key, generator.integers(0, 30, n)


def test_every_pair_gets_another_prompt_and_each_is_used_once_where_that_is_possible(drawn):
    prompt_key, _ = drawn
    partner = reading.other_prompts(prompt_key, seed=1)
    assert (prompt_key[partner] != prompt_key).all()
    n, most = len(prompt_key), np.unique(prompt_key, return_counts=True)[1].max()
    uses = np.bincount(partner, minlength=n)
    # Of a prompt with more than half of the pairs, each other pair has to serve several.
    assert uses.max() <= (1 if 2 * most <= n else 1 + -(-most // (n - most)))
    assert (reading.other_prompts(prompt_key, seed=1) == partner).all()


def test_the_seed_draws_the_prompts():
    assert len({tuple(reading.other_prompts(np.arange(20), seed)) for seed in range(10)}) == 10


def test_the_matched_answer_is_the_nearest_by_brute_force(drawn):
    prompt_key, lengths = drawn
    partner = reading.matched_in_length(lengths, prompt_key)
    distance = np.abs(lengths[:, None] - lengths).astype(float)
    distance[prompt_key[:, None] == prompt_key] = np.inf
    rows = np.arange(len(lengths))
    assert (distance[rows, partner] == distance.min(axis=1)).all()  # finite: never the own prompt
    nearest = [lengths[np.flatnonzero(row == row.min())].min() for row in distance]
    assert lengths[partner].tolist() == nearest  # of two as near the shorter one


def test_one_prompt_alone_has_no_partners():
    same = np.array([7, 7, 7])
    assert reading.other_prompts(same, seed=0).tolist() == [-1, -1, -1]
    assert reading.matched_in_length(np.array([3, 1, 2]), same).tolist() == [-1, -1, -1]


def test_no_more_pairs_are_checked_than_intended_and_none_against_the_same_text(monkeypatch):
    monkeypatch.setattr(reading, "READING_PAIRS", 3)
    chosen = np.array(["four", "a", "bb", "cc", " four\n"], dtype=object)
    shuffled, matched = reading.reading_partners(np.arange(5), chosen, np.array([4, 1, 2, 2, 4]))
    assert (shuffled >= 0).tolist() == [True, False, True, False, True]
    assert matched.tolist() == [-1, -1, 3, -1, -1]
