"""Pairs are checked, made unique and split by prompt."""

import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from reward_pipeline.conversations import MIN_MAX_LENGTH, first_refused
from reward_pipeline.files import InputError
from reward_pipeline.schemas import _contents, checked_pairs
from reward_pipeline.sources import Row

EXAMPLES = 3  # places kept of each reason to drop a pair


def readable_pairs(rows: Iterable[Row], tokenizer) -> Iterator[tuple[Row, dict[str, Any] | None, str | None]]:
    """As `checked_pairs`, without pairs whose turns the chat template refuses; some know no system turns."""

    @functools.cache  # what a template refuses is an order of roles, and there are few
    def refusal(roles: tuple[str, ...]) -> str | None:
        refused = first_refused(tokenizer, [[{"role": role, "content": role} for role in roles]], MIN_MAX_LENGTH)
        return refused[1] if refused else None

    for row, pair, reason in checked_pairs(rows):
        refused = refusal(tuple(message["role"] for message in pair["prompt"])) if pair else None
        yield (row, None, refused) if refused else (row, pair, reason)


def pair_keys(pair: dict[str, Any]) -> dict[str, Any]:
    """Hashes that find equal prompts, and equal or swapped pairs, without holding any text in memory."""
    prompt = json.dumps(_contents(pair["prompt"]))
    first, second = sorted((pair["chosen"].strip(), pair["rejected"].strip()))
    return {
        "prompt_key": _hash(prompt),
        "pair_key": _hash(json.dumps([prompt, first, second])),
        "swapped": first != pair["chosen"].strip(),
    }


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


class Tally:
    """Rows read, pairs in them, and pairs dropped with the reasons and the first places where each occurred."""

    def __init__(self):
        self.rows, self.pairs, self.dropped, self.examples = 0, 0, Counter(), {}

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows += 1
            yield row

    def drop(self, reason: str, location: str) -> None:
        self.dropped[reason] += 1
        if len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(location)

    def drop_pairs(self, reason: str, pairs: Dataset, indices: np.ndarray) -> None:
        if len(indices):
            self.dropped[reason] += len(indices)
            self.examples[reason] = list(pairs.select(indices[:EXAMPLES])["place"])


def unique_pairs(pair_key: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pairs to keep: the first of equal ones, none of those that contradict each other.

    Args:
        pair_key: (N,) int64, the same for equal and for swapped pairs.
        swapped: (N,) bool, tells a pair from its contradiction.

    Returns:
        Indices of the pairs to keep, of their duplicates and of the pairs in contradictions, each in ascending order.
    """
    _, first, group = np.unique(pair_key, return_index=True, return_inverse=True)
    size = np.bincount(group)
    contradicts = (np.bincount(group, weights=swapped) % size) != 0
    kept = np.sort(first[~contradicts])
    return kept, np.setdiff1d(np.flatnonzero(~contradicts[group]), kept), np.flatnonzero(contradicts[group])


def split_by_prompt(prompt_key: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split pairs so that no prompt stands on both sides.

    Args:
        prompt_key: (N,) hash of each pair's prompt.
        share: part of the pairs for validation; prompts with several pairs may shift it by a few.
        seed: of the order in which prompts are drawn.

    Returns:
        Indices of the training and of the validation pairs, each in ascending order.

    Raises:
        InputError: fewer than two prompts.
    """
    _, prompt, sizes = np.unique(prompt_key, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise InputError("all pairs share one prompt; at least two are needed for a training and a validation split")
    wanted = len(prompt_key) - int(len(prompt_key) * (1 - share))
    order, taken = list(range(len(sizes))), 0
    random.Random(seed).shuffle(order)
    in_validation = np.zeros(len(sizes), dtype=bool)
    for index in order:
        if taken + sizes[index] <= wanted:
            in_validation[index] = True
            taken += sizes[index]
    if not in_validation.any():
        in_validation[min(order, key=lambda index: sizes[index])] = True
    validation = in_validation[prompt]
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def draw(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Indices of at most `limit` of `count` items, in ascending order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))


def is_validation_prompt(prompt_key: int, share: float, seed: int) -> bool:
    """Side of a prompt by its hash alone, for streams, of which no process ever sees all: `share` of all."""
    return _hash(f"{seed} {prompt_key}") % 2**32 < share * 2**32


def half_of(pairs: Dataset, half: int | None, seed: int) -> Dataset:
    """The pairs of one half of the prompts, or all pairs; `seed` is that of the data, the same for both halves."""
    if half is None:
        return pairs
    texts = pairs.select_columns(["prompt", "chosen", "rejected"])
    prompt_keys = np.array([pair_keys(pair)["prompt_key"] for pair in texts])
    return pairs.select(split_by_prompt(prompt_keys, 0.5, seed)[half - 1])
