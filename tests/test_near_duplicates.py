"""Prompts that are nearly the same."""

import random

import numpy as np

from reward_pipeline import near_duplicates as room

WORDS = [f"word{number}" for number in range(200)]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = room.spelling(text).split()
    return {tuple(words[start : start + room.WORDS]) for start in range(len(words) - room.WORDS + 1)}


def test_signatures_estimate_the_similarity_of_shingles():
    draw, errors = random.Random(0), []
    for changed in (0, 1, 2, 4, 8):
        for _ in range(20):
            words = draw.choices(WORDS, k=40)
            other = list(words)
            for place in draw.sample(range(40), changed):
                other[place] = "changed"
            one, two = " ".join(words), " ".join(other)
            exact = len(shingles(one) & shingles(two)) / len(shingles(one) | shingles(two))
            errors.append((room.signature(one) == room.signature(two)).mean() - exact)
    assert abs(np.mean(errors)) < 0.03 and np.abs(errors).max() < 0.45  # of 32 hashes: a deviation of 0.09 at most


def test_long_prompts_with_another_word_are_found_and_others_are_not():
    draw = random.Random(1)
    trained = [" ".join(draw.choices(WORDS, k=40)) for _ in range(50)]
    changed = trained[7].replace(trained[7].split()[20], "another")
    held_out = [" ".join(draw.choices(WORDS, k=40)), changed, f"{trained[3].upper()}!", "Name the number after 1."]
    found = room.near_duplicates(held_out, [*trained, "Name the number after 0."])
    assert found == [(1, 7), (2, 3)]
    assert room.near_duplicates([], trained) == room.near_duplicates(held_out, []) == []
