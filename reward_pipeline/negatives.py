"""Pairs that nobody had to label: the answer to another prompt is the rejected one.

What people prefer can mostly be told from what good answers look like, and a model of that needs no prompt. An answer
that is as good, as long and as tidy, but to another question, is told by reading both (RRM, arXiv 2409.13156).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from reward_pipeline.conversations import response_text
from reward_pipeline.pairs import prompt_key

NEIGHBOURS = 12  # on either side in the order of length, among which the other answer is drawn


def mismatched_pairs(pairs: Mapping[str, list], share: float, generator: np.random.Generator) -> dict[str, list[Any]]:
    """Some of N pairs, each with an answer to another one's prompt, of about the same length, as the rejected one.

    The other answer is drawn from all 2 N, chosen and rejected ones alike: what is wrong with it is the prompt.

    Args:
        pairs: columns `prompt`, `chosen`, `rejected` and `place`, and any others.
        share: of the N pairs.

    Returns:
        All columns, of round(share N) pairs without ratings; fewer where answers of a length have one prompt or text.
    """
    count = len(pairs["prompt"])
    answers = [*pairs["chosen"], *pairs["rejected"]]
    texts = [response_text(answer).strip() for answer in answers]
    prompts = [prompt_key(prompt) for prompt in pairs["prompt"]] * 2
    order = np.argsort([len(text) for text in texts], kind="stable")
    rank = np.argsort(order)
    made: dict[str, list[Any]] = {name: [] for name in pairs}
    for index in np.sort(generator.choice(count, round(share * count), replace=False)):
        near = order[max(rank[index] - NEIGHBOURS, 0) : rank[index] + NEIGHBOURS + 1]
        others = [each for each in near if prompts[each] != prompts[index] and texts[each] != texts[index]]
        if others:
            other = generator.choice(others)
            place = f"{pairs['place'][index]}, with the answer of {pairs['place'][other % count]}"
            row = {name: column[index] for name, column in pairs.items()}
            # Ratings are of answers to the own prompt.
            row |= {name: None for name in ("chosen_rating", "rejected_rating") if name in row}
            for name, value in (row | {"rejected": answers[other], "place": place}).items():
                made[name].append(value)
    return made
