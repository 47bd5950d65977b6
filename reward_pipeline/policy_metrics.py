"""Answers before and after become figures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_pipeline.evaluator import Prompt, RewardModelEvaluator
from reward_pipeline.files import rounded
from reward_pipeline.statistics import bootstrap_interval, rate_interval, wilcoxon_p, wins

SIGNIFICANT_DIGITS = 3  # of p-values, which four decimals would round to 0


def distinct(texts: Sequence[str], n: int = 3) -> float:
    """Share of different ones among all word n-grams of the texts (arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Mean share of a text's word n-grams that occurred in it before."""
    shares = [1 - len(set(grams)) / len(grams) for grams in (n_grams(text, n) for text in texts) if grams]
    return float(np.mean(shares)) if shares else 0.0


def cut_to_equal_words(texts: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each text and its partner with as many words as the shorter of both has: more n-grams repeat more."""
    pairs = [(text.split(), other.split()) for text, other in zip(texts, others, strict=True)]
    sizes = [min(map(len, pair)) for pair in pairs]
    first, second = zip(*pairs, strict=True)
    return tuple([" ".join(words[:size]) for words, size in zip(side, sizes, strict=True)] for side in (first, second))


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


class Answers(NamedTuple):
    """What one policy answered to N evaluation prompts."""

    texts: list[str]
    lengths: np.ndarray  # (N,) tokens, end token included
    ended: np.ndarray  # (N,) bool
    kl: np.ndarray  # (N,) nats to the reference


def judge(
    evaluator: RewardModelEvaluator, prompts: Sequence[Prompt], before: Answers, after: Answers
) -> dict[str, Any]:
    """Rewards of both sides by one judge and the paired comparison of them; see `evaluation`."""
    messages = [prompt.messages for prompt in prompts]
    scores = evaluator.get_reward_scores([*messages, *messages], [*before.texts, *after.texts], progress=True)
    old, new = np.array(scores).reshape(2, len(prompts))
    won = wins(new, old)
    return {
        "rewards_before": old,
        "rewards_after": new,
        "reward_before": float(old.mean()),
        "reward_after": float(new.mean()),
        "reward_gain": float((new - old).mean()),
        "reward_gain_interval": bootstrap_interval(new - old),
        "wilcoxon_p": wilcoxon_p(new - old),
        "win_rate": float(won.mean()),
        "win_rate_interval": rate_interval(won),
    }


def evaluation(before: Answers, after: Answers, first: dict[str, Any], second: dict[str, Any] | None) -> dict[str, Any]:
    """Content of `evaluation.json`.

    Returns:
        By the training judge: `n`, `reward_before`, `reward_after`, `reward_gain` and its paired bootstrap 95 %
        interval, `wilcoxon_p`, `win_rate` against SFT (ties half) and its interval; the same with `second_judge_`
        in front by the second judge, None without one. Of the texts: mean lengths in tokens and `length_ratio`;
        `distinct3` before and after, of each pair of answers cut to equal length, and `distinct3_ratio`;
        `repetition` and `ended` before and after; mean `kl` of the policy's answers to the reference in nats.
    """
    kept = ("reward_before", "reward_after", "reward_gain", "reward_gain_interval", "wilcoxon_p", "win_rate")
    kept = (*kept, "win_rate_interval")
    texts: dict[str, float] = {}
    equal = cut_to_equal_words(before.texts, after.texts)
    for when, each, cut in (("before", before, equal[0]), ("after", after, equal[1])):
        texts |= {
            f"length_{when}": float(each.lengths.mean()),
            f"distinct3_{when}": distinct(cut),
            f"repetition_{when}": repetition(each.texts),
            f"ended_{when}": float(each.ended.mean()),
        }
    return {
        "n": len(before.texts),
        **{name: first[name] for name in kept},
        **{f"second_judge_{name}": second[name] if second else None for name in kept},
        **texts,
        "length_ratio": texts["length_after"] / texts["length_before"],
        "distinct3_ratio": texts["distinct3_after"] / texts["distinct3_before"],
        "kl": float(after.kl.mean()),
    }


def readable(results: dict[str, Any]) -> dict[str, Any]:
    """The results with four decimals, p-values with three significant digits."""
    p_values = {name: value for name, value in results.items() if name.endswith("wilcoxon_p") and value is not None}
    return rounded(results) | {name: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for name, value in p_values.items()}


def samples(prompts: Sequence[Prompt], before: Answers, after: Answers, first: dict, second: dict | None) -> list[dict]:
    """A row for each evaluation prompt, with both answers and their rewards."""
    rows = []
    for number, prompt in enumerate(prompts):
        row = {"prompt": prompt.messages, "before": before.texts[number], "after": after.texts[number]}
        for name, result in (("reward", first), ("second_judge", second)):
            if result:
                row |= {f"{name}_{when}": float(result[f"rewards_{when}"][number]) for when in ("before", "after")}
        rows.append(row)
    return rows
