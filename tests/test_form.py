"""What can be told of an answer without reading it."""

import pytest

from reward_pipeline.form import longer_wins, response_length


def test_length_is_that_of_the_text_whatever_holds_it():
    assert response_length("  an answer \n") == response_length([{"role": "assistant", "content": "an answer"}]) == 9


def test_longer_wins_counts_ties_half():
    assert longer_wins(["aaa", "b", "c ", "dd"], ["a", "bb", "c", "dd"]) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert longer_wins([[{"role": "assistant", "content": "aaa"}]], ["a"]) == 1
