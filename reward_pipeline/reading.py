"""Does a reward model read the prompt? The other prompt, and the other answer, that a pair is checked with.

An answer that is good under any prompt is told by its looks. One that is good under its own needs a model that reads.
"""

import numpy as np

READING_PAIRS = 400  # of a source that are checked, spread over it: each costs three more scorings


def other_prompts(prompt_key: np.ndarray, seed: int) -> np.ndarray:
    """(N,) index of a pair with another prompt for each pair; -1 where all have the same one.

    Every pair serves once, unless a prompt has more than half of them.

    Args:
        prompt_key: (N,) equal for pairs of one prompt.
        seed: draws the order of the prompts.
    """
    _, prompt, sizes = np.unique(prompt_key, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return np.full(len(prompt), -1)
    rank = np.random.default_rng(seed).permutation(len(sizes))[prompt]
    order = np.argsort(rank, kind="stable")  # pairs of a prompt beside each other, the prompts in random order
    start, size = np.searchsorted(rank[order], rank[order]), sizes[prompt[order]]
    # All are moved by the size of the largest block, so each leaves its own. Counted from the end of that, over the
    # pairs of other prompts alone, it holds for a block of more than half as well.
    steps = (np.arange(len(order)) - start + sizes.max() - size) % (len(order) - size)
    partner = np.empty_like(order)
    partner[order] = order[(start + size + steps) % len(order)]
    return partner


def matched_in_length(lengths: np.ndarray, prompt_key: np.ndarray) -> np.ndarray:
    """(N,) index of the answer to another prompt that is nearest in length; -1 where all have the same prompt.

    Of two that are as near the shorter one; of equal lengths the order given decides.

    Args:
        lengths: (N,) of an answer each.
        prompt_key: (N,) equal for answers to one prompt.
    """
    order = np.argsort(lengths, kind="stable")
    key, ascending = prompt_key[order], lengths[order].astype(float)
    # The nearest ones of another prompt stand on either side of a run of answers to the same one.
    bounds: np.ndarray = np.flatnonzero(key[1:] != key[:-1]) + 1
    run = np.searchsorted(bounds, np.arange(len(order)), side="right")
    before, after = np.append(0, bounds)[run], np.append(bounds, len(order))[run] + 1  # as places between two ends
    places, ends = np.concatenate([[-1], order, [-1]]), np.concatenate([[-np.inf], ascending, [np.inf]])
    partner = np.empty_like(order)
    partner[order] = places[np.where(ends[after] - ascending < ascending - ends[before], after, before)]
    return partner


def reading_partners(
    prompt_key: np.ndarray, chosen: np.ndarray, chosen_length: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `READING_PAIRS` of N pairs, evenly spread, are checked with.

    Args:
        prompt_key, chosen, chosen_length: (N,) hash of the prompt, chosen answer and its length.

    Returns:
        (N,) index of the pair whose prompt stands in for the own one, and (N,) of the pair whose chosen answer stands
        beside the own one; -1 where nothing is checked, in the second also where both answers have the same text.
    """
    n = len(prompt_key)
    checked = np.linspace(0, n - 1, min(n, READING_PAIRS)).astype(int)
    shuffled, matched = np.full((2, n), -1)
    shuffled[checked] = other_prompts(prompt_key, seed=0)[checked]
    matched[checked] = matched_in_length(chosen_length, prompt_key)[checked]
    same = [index for index in checked if chosen[index].strip() == chosen[matched[index]].strip()]
    matched[same] = -1
    return shuffled, matched
