"""Answers to other prompts as negatives."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from test_pair_metrics import assistant, user

from reward_pipeline.negatives import NEIGHBOURS, mismatched_pairs


def columns(pairs: list[tuple[str, str, str]]) -> dict[str, list]:
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return {
        "prompt": [user(text) for text in prompts],
        "chosen": [assistant(text) for text in chosen],
        "rejected": [assistant(text) for text in rejected],
        "place": [f"row {number}" for number in range(1, len(pairs) + 1)],
    }


def made(pairs: list[tuple[str, str, str]], share: float, seed: int = 0) -> list[tuple[str, str, str, str]]:
    drawn = mismatched_pairs(columns(pairs), share, np.random.default_rng(seed))
    texts = ([turns[-1]["content"] for turns in drawn[name]] for name in ("prompt", "chosen", "rejected"))
    return list(zip(*texts, drawn["place"], strict=True))


def test_with_two_prompts_there_is_one_way():
    pairs = [("a", "yes a", "no a"), ("b", "yes b", "no b")]
    own, other = ({each[1:] for each in pairs if each[0] == name} for name in "ab")
    rows = made(pairs, 1.0)
    assert [(prompt, chosen) for prompt, chosen, _, _ in rows] == [("a", "yes a"), ("b", "yes b")]
    assert rows[0][2] in next(iter(other)) and rows[1][2] in next(iter(own))
    assert [place for *_, place in rows] == ["row 1, with the answer of row 2", "row 2, with the answer of row 1"]


@hypothesis.given(
    strategies.lists(strategies.tuples(*[strategies.text("ab ", min_size=1, max_size=9)] * 3), min_size=1, max_size=30),
    strategies.sampled_from([0.0, 0.15, 0.5, 1.0]),
)
def test_own_prompt_and_answer_beside_the_answer_to_another_prompt(pairs, share):
    rows = made(pairs, share)
    assert len(rows) <= round(share * len(pairs))
    for prompt, chosen, rejected, _ in rows:
        assert any(each[:2] == (prompt, chosen) for each in pairs)
        assert any(rejected in each[1:] and each[0].strip() != prompt.strip() for each in pairs)
        assert rejected.strip() != chosen.strip()


def test_the_other_answer_is_among_the_nearest_in_length():
    generator = np.random.default_rng(0)
    pairs = [(f"prompt {number}", *("x" * size for size in generator.integers(1, 2000, 2))) for number in range(300)]
    lengths = sorted(len(text) for _, *answers in pairs for text in answers)
    rows = made(pairs, 0.5)
    assert len(rows) == 150
    for _, chosen, rejected, _ in rows:
        between = sum(min(len(chosen), len(rejected)) < length < max(len(chosen), len(rejected)) for length in lengths)
        assert between < NEIGHBOURS
    assert any(len(rejected) > len(chosen) for _, chosen, rejected, _ in rows)
    assert any(len(rejected) < len(chosen) for _, chosen, rejected, _ in rows)


def test_ratings_of_other_answers_are_left_out():
    pairs = columns([("a", "yes a", "no a"), ("b", "yes b", "no b")]) | {
        "chosen_rating": [4.0] * 2,
        "category": ["x"] * 2,
    }
    drawn = mismatched_pairs(pairs | {"rejected_rating": [1.0] * 2}, 1.0, np.random.default_rng(0))
    assert drawn["chosen_rating"] == drawn["rejected_rating"] == [None, None] and drawn["category"] == ["x", "x"]


def test_rejected_answers_serve_as_well_and_the_seed_decides():
    pairs = [(f"prompt {number}", f"good {number}", f"poor {number}") for number in range(100)]
    rows = made(pairs, 0.5)
    assert {rejected.split()[0] for _, _, rejected, _ in rows} == {"good", "poor"}
    assert made(pairs, 0.5) == rows != made(pairs, 0.5, seed=1)


@pytest.mark.parametrize("pairs", [[("same", "a", "b"), (" same ", "c", "d")], [("one", "yes", "yes")] * 2])
def test_without_another_prompt_or_text_there_are_none(pairs):
    assert made(pairs, 1.0) == []
