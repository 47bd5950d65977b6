"""Pairs are checked, made unique and split by prompt."""

import functools
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from reward_pipeline.conversations import Messages, calls_as_text, first_refused, response_text, stripped_turns
from reward_pipeline.files import InputError
from reward_pipeline.layouts import recognised
from reward_pipeline.near_duplicates import spelling
from reward_pipeline.schemas import checked_pairs
from reward_pipeline.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3  # places kept of each reason to drop a pair, and of each warning
MUCH = 0.3  # share of the pairs, dropped for one reason, that is worth a warning
REPEATS = "an answer repeats its prompt: only what was answered belongs there"
MARKUP = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|<(?:start|end)_of_turn>|\[/?INST\]"
    r"|^#{2,3} ?(?:Instruction|Response|Human|Assistant):|^(?:Human|Assistant):",
    re.MULTILINE,
)


def readable_pairs(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Row, dict[str, Any] | None, str | None]]:
    """As `checked_pairs`, with tool calls as the text that the chat template makes of them.

    Pairs whose turns it refuses have that reason: some templates know no system turns, most no tools.
    """

    @functools.cache  # what a template refuses is an order of roles, and there are few
    def refusal(roles: tuple[str, ...]) -> str | None:
        refused = first_refused(tokenizer, [[{"role": role, "content": role} for role in roles]])
        return refused[1] if refused else None

    for row, pair, reason in checked_pairs(rows):
        if pair:
            try:
                pair["prompt"] = calls_as_text(tokenizer, pair["prompt"])
                reason = refusal(tuple(message["role"] for message in pair["prompt"]))
            except ValueError as error:
                reason = str(error)
            except RecursionError:  # arguments of a tool, to the depth that JSON may have
                reason = "nested too deeply"
        yield row, None if reason else pair, reason


def pair_keys(pair: dict[str, Any]) -> dict[str, Any]:
    """Hashes that find equal prompts, and equal or swapped pairs, without holding any text in memory.

    Args:
        pair: `prompt` (messages), `chosen` and `rejected` (text or messages); outer white space makes no difference.
    """
    prompt = _prompt_text(pair["prompt"])
    chosen, rejected = (response_text(pair[side]).strip() for side in ("chosen", "rejected"))
    first, second = sorted((chosen, rejected))  # so that a pair and its contradiction have one key
    return {
        "prompt_key": text_hash(prompt),
        "spelling_key": spelling_key(pair["prompt"]),
        "pair_key": text_hash(json.dumps([prompt, first, second])),
        "swapped": first != chosen,
    }


def prompt_key(prompt: Messages) -> int:
    """Hash that equal prompts have in common, outer white space of their turns aside."""
    return text_hash(_prompt_text(prompt))


def spelling_key(prompt: Messages) -> int:
    """Hash that prompts have in common which differ in spelling alone, see `near_duplicates.spelling`."""
    return text_hash(json.dumps([(role, spelling(text), *calls) for role, text, *calls in stripped_turns(prompt)]))


def split_keys(prompt_key: np.ndarray, spelling_key: np.ndarray) -> np.ndarray:
    """(N,) int64 keys to split pairs by: spellings of one prompt have one, all others that of the prompt itself."""
    _, prompt = np.unique(spelling_key, return_inverse=True)
    least = np.full(len(prompt_key), np.iinfo(np.int64).max)
    np.minimum.at(least, prompt, prompt_key)
    return least[prompt]


def suspicions(pair: dict[str, Any]) -> list[str]:
    """What looks wrong in a pair though it can be read, in words."""
    *_, asked = texts = [message["content"].strip() for message in pair["prompt"]]
    answers = [response_text(pair[side]).strip() for side in ("chosen", "rejected")]
    found = {
        REPEATS: len(asked.split()) >= 3 and any(answer.startswith(asked) for answer in answers),
        "a text has the markup of a chat template or a transcript in it, which is read as text": any(
            map(MARKUP.search, texts + answers)
        ),
        "the system turn is empty": any(
            message["role"] == "system" and not message["content"].strip() for message in pair["prompt"]
        ),
    }
    return [words for words, holds in found.items() if holds]


def _prompt_text(prompt: Messages) -> str:
    return json.dumps(stripped_turns(prompt))


def text_hash(text: str) -> int:
    """Hash of 64 bits with a sign, as Arrow and NumPy store it; the same in every process, unlike Python's own."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


class Tally:
    """Rows read, pairs in them, and pairs dropped with the reasons and the first places where each occurred."""

    def __init__(self) -> None:
        self.rows, self.pairs = 0, 0
        self.dropped: Counter[str] = Counter()
        self.warned: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.read_as: list[str] = []

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows of one source, counted as they pass; the first one that is recognised tells its layout."""
        layout = None
        for row in rows:
            self.rows += 1
            if layout is None and (layout := recognised(row.values)):
                self.read_as.append(f"{layout.name}: {layout.words}")
            yield row

    def drop(self, reason: str, location: str) -> None:
        self._note(self.dropped, reason, location)

    def warn(self, words: str, location: str) -> None:
        self._note(self.warned, words, location)

    def _note(self, counter: Counter[str], words: str, location: str) -> None:
        counter[words] += 1
        if len(self.examples.setdefault(words, [])) < EXAMPLES:
            self.examples[words].append(location)

    def drop_pairs(self, reason: str, pairs: Dataset, indices: np.ndarray) -> None:
        if len(indices):
            self.dropped[reason] += len(indices)
            self.examples[reason] = list(pairs.select(indices[:EXAMPLES])["place"])

    def summary(self) -> dict[str, Any]:
        """All counts, for `metadata.json`."""
        return {
            "read": self.rows,
            "pairs": self.pairs,
            "dropped_total": self.dropped.total(),
            "dropped": dict(self.dropped),
            "first_dropped": {reason: self.examples[reason] for reason in self.dropped},
            "warnings": self.warnings(),
            "read_as": self.read_as,
        }

    def warnings(self) -> dict[str, dict[str, Any]]:
        """What looks wrong, with how many pairs or prompts it concerns and the first places."""
        most = {
            f"{count / self.pairs:.0%} of the pairs were dropped for one reason: {reason}": (count, reason)
            for reason, count in self.dropped.items()
            if count >= max(MUCH * self.pairs, 2)
        }
        noted = {**most, **{words: (count, words) for words, count in self.warned.items()}}
        return {words: {"count": count, "first": self.examples[key]} for words, (count, key) in noted.items()}


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
    contradicts = (np.bincount(group, weights=swapped) % size) != 0  # neither none of a group swapped, nor all of it
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
        what = "all pairs share one prompt" if len(prompt) > 1 else "only one pair is usable"
        raise InputError(f"{what}; at least two prompts are needed for a training and a validation split")
    # Training rounds down, but not to nothing: 8,678 pairs give 6,942 and 1,736.
    wanted = len(prompt_key) - max(1, int(len(prompt_key) * (1 - share)))
    order, taken = list(range(len(sizes))), 0
    random.Random(seed).shuffle(order)  # of Python, whose order for a seed does not change with its version
    in_validation: np.ndarray = np.zeros(len(sizes), dtype=bool)
    for index in order:
        if taken + sizes[index] <= wanted:  # a prompt that is too large is passed over, later ones fill the rest
            in_validation[index] = True
            taken += sizes[index]
    if not in_validation.any():  # every prompt has more pairs than wanted
        in_validation[min(order, key=lambda index: sizes[index])] = True
    validation = in_validation[prompt]
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def draw(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Indices of at most `limit` of `count` items, in ascending order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))


def is_validation_prompt(spelling_key: int, share: float, seed: int) -> bool:
    """Side of a prompt by its hash alone, for streams, of which no process ever sees all: `share` of all."""
    return text_hash(f"{seed} {spelling_key}") % 2**32 < share * 2**32


def half_of(pairs: Dataset, half: int | None, seed: int) -> Dataset:
    """The pairs of one half of the prompts, or all pairs; `seed` is that of the data, the same for both halves."""
    if half is None:
        return pairs
    prompts = [pair["prompt"] for pair in pairs.select_columns(["prompt"])]
    keys = (np.array([key(prompt) for prompt in prompts]) for key in (prompt_key, spelling_key))
    return pairs.select(split_by_prompt(split_keys(*keys), 0.5, seed)[half - 1])
