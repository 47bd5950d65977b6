"""Answers before and after become figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from reward_pipeline.cards import policy_card, samples_table
from reward_pipeline.conversations import PROMPT_SHARE, encode, encode_prompt
from reward_pipeline.evaluator import RewardModelEvaluator, check_templates, trained_scale
from reward_pipeline.files import InputError, json_lines, rounded, write_checksums, write_text
from reward_pipeline.models import weights_digest
from reward_pipeline.plots import plot_before_and_after, plot_steps
from reward_pipeline.processes import is_first_process
from reward_pipeline.rollouts import Answers, PolicyPrompt
from reward_pipeline.statistics import bootstrap_interval, rate_interval, wilcoxon_p, wins

SCALE_PAIRS = 256  # of the validation split, for the standard deviation of a judge that was not trained here
SIGNIFICANT_DIGITS = 3  # of p-values, which four decimals would round to 0
# of the comparison by one judge, what goes into `evaluation.json`
JUDGED = (
    *("reward_before", "reward_after", "reward_gain", "reward_gain_interval", "wilcoxon_p"),
    *("win_rate", "win_rate_interval"),
)


def load_judge(
    flag: str,
    path: str,
    prompts: Sequence[PolicyPrompt],
    max_prompt_length: int,
    max_new_tokens: int,
    device: torch.device,
    validation: Dataset,
) -> RewardModelEvaluator:
    """A reward model with rewards in standard deviations, which reads whole prompts and completions.

    The deviations are those that its training found; a model of others, whose config has none, gets those of its
    rewards for the answers of `validation`.

    Args:
        flag: that named it, for messages.
        prompts: whose completions it will score.
        max_prompt_length, max_new_tokens: the most tokens of a prompt and of a completion.
        validation: pairs with `prompt`, `chosen`, `rejected` and `place`.

    Raises:
        InputError: it can not be loaded, would have to cut, or its chat template refuses one of the prompts.
    """
    judge = RewardModelEvaluator(path, device=str(device), mixed_precision=True)
    closing = len(encode(judge.tokenizer, "?", "", judge.max_length)) - len(encode_prompt(judge.tokenizer, "?"))
    whole, reads = max_prompt_length + max_new_tokens + closing, judge.max_length
    halved = judge.members[0].halve_prompt
    of_prompt = int(reads * PROMPT_SHARE) if halved else reads
    if whole > reads or max_prompt_length > of_prompt:
        raise InputError(
            f"--{flag} {path}: reads {reads} tokens{f', {of_prompt} of them of the prompt' if halved else ''}, but "
            f"prompts of {max_prompt_length} and completions of {max_new_tokens} with what closes them have {whole}; "
            "lower --max_prompt_length and --max_new_tokens, or train it on data with a larger --max_length"
        )
    check_templates(judge, [prompt.messages for prompt in prompts], [prompt.place for prompt in prompts])
    mean, std = trained_scale(judge.model.config) or measured_scale(judge, validation)
    judge.members[0] = judge.members[0]._replace(mean=mean, std=std)
    return judge


def measured_scale(judge: RewardModelEvaluator, validation: Dataset) -> tuple[float, float]:
    """Mean and standard deviation of a judge's rewards for both answers of the first `SCALE_PAIRS` pairs.

    Raises:
        InputError: its chat template refuses a prompt, or all answers have the same reward.
    """
    pairs = validation.select(range(min(SCALE_PAIRS, len(validation))))
    name, prompts = judge.model.name_or_path, [*pairs["prompt"]]
    if is_first_process():
        print(f"{name}: has no reward_mean and reward_std; measured on {len(pairs)} validation pairs")
    check_templates(judge, prompts, pairs["place"])
    answers = [*pairs["chosen"], *pairs["rejected"]]
    scores = judge.get_member_scores([*prompts, *prompts], answers, progress=is_first_process())
    if not scores.std():
        raise InputError(f"{name}: gives all validation answers the same reward; name another model")
    return float(scores.mean()), float(scores.std())


def judge_identity(judge: RewardModelEvaluator) -> dict[str, Any]:
    """What tells a judge from another one, wherever it lies."""
    return {"weights": weights_digest(judge.model.name_or_path), "max_length": judge.max_length}


def distinct(texts: Sequence[str], n: int = 3) -> float:
    """Share of different ones among all word n-grams of the texts (arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Mean share of a text's word n-grams that occurred in it before."""
    shares = [1 - len(set(grams)) / len(grams) for grams in (n_grams(text, n) for text in texts) if grams]
    return float(np.mean(shares)) if shares else 0.0


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words, in order."""
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def cut_to_equal_words(texts: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each text and its partner with as many words as the shorter of both has: more n-grams repeat more."""
    cut: tuple[list[str], list[str]] = [], []
    for pair in zip(texts, others, strict=True):
        words = [text.split() for text in pair]
        size = min(map(len, words))
        for side, each in zip(cut, words, strict=True):
            side.append(" ".join(each[:size]))
    return cut


def compare_answers(
    judge: RewardModelEvaluator, prompts: Sequence[PolicyPrompt], before: Answers, after: Answers
) -> dict[str, Any]:
    """Rewards of both sides by one judge and the paired comparison of them.

    Returns:
        `rewards_before`, `rewards_after`, (N,) each, and the figures that `evaluation` describes.
    """
    messages = [prompt.messages for prompt in prompts]
    # Not `get_reward_scores`, which refuses empty answers: a policy samples some.
    scores = judge.get_member_scores([*messages, *messages], [*before.texts, *after.texts], progress=True)
    old, new = judge.combine(scores).reshape(2, len(prompts))
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


def evaluation(
    before: Answers, after: Answers, judged: dict[str, Any], judged_second: dict[str, Any] | None
) -> dict[str, Any]:
    """Content of `evaluation.json`, from the answers and from `compare_answers` by one or two judges.

    Returns:
        By the training judge: `n`, `reward_before`, `reward_after`, `reward_gain` and its paired bootstrap 95 %
        interval, `wilcoxon_p`, `win_rate` against SFT (ties half) and its interval; the same with `second_judge_`
        in front by the second judge, None without one. Of the texts: mean lengths in tokens and `length_ratio`;
        `distinct3` before and after, of each pair of answers cut to equal length, and `distinct3_ratio`;
        `repetition` and `ended` before and after; mean `kl` of the policy's answers to the reference in nats.
    """
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
        **{name: judged[name] for name in JUDGED},
        **{f"second_judge_{name}": judged_second[name] if judged_second else None for name in JUDGED},
        **texts,
        "length_ratio": texts["length_after"] / texts["length_before"],
        "distinct3_ratio": texts["distinct3_after"] / texts["distinct3_before"],
        "kl": float(after.kl.mean()),
    }


def rounded_evaluation(results: dict[str, Any]) -> dict[str, Any]:
    """The results with four decimals, p-values with three significant digits."""
    p_values = {name: value for name, value in results.items() if name.endswith("wilcoxon_p") and value is not None}
    return rounded(results) | {name: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for name, value in p_values.items()}


def sample_rows(
    prompts: Sequence[PolicyPrompt],
    before: Answers,
    after: Answers,
    judged: dict[str, Any],
    judged_second: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """A row for each evaluation prompt, with both answers and their rewards."""
    rows = []
    for number, prompt in enumerate(prompts):
        row: dict[str, Any] = {
            "prompt": prompt.messages,
            "before": before.texts[number],
            "after": after.texts[number],
        }
        for name, result in (("reward", judged), ("second_judge", judged_second)):
            if result:
                row |= {f"{name}_{when}": float(result[f"rewards_{when}"][number]) for when in ("before", "after")}
        rows.append(row)
    return rows


def write_policy_results(
    directory: Path,
    before: Answers,
    after: Answers,
    judged: dict[str, Any],
    results: dict[str, Any],
    samples: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    log: Sequence[dict[str, Any]],
) -> None:
    """Complete a saved policy with its figures, samples, settings, log, plots and card.

    Args:
        judged: by the training judge, of `compare_answers`.
        results: of `evaluation`.
        samples: of `sample_rows`.
        settings: resolved settings of the run.
        log: an entry an update.
    """
    (directory / "plots").mkdir()
    plot_steps(log, directory / "plots" / "training.png")
    plot_before_and_after(before, after, judged, directory / "plots" / "before_and_after.png")
    for name, content in {"evaluation": rounded_evaluation(results), "settings": settings}.items():
        write_text(directory / f"{name}.json", json.dumps(content, indent=2) + "\n")
    for name, lines in {"samples": samples, "metrics": log}.items():
        write_text(directory / f"{name}.jsonl", json_lines(lines))
    write_text(directory / "samples.md", samples_table(samples))
    write_text(directory / "README.md", policy_card(results, settings, log))
    write_checksums(directory)
