"""Answers before and after become figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from reward_pipeline.cards import policy_card, samples_page
from reward_pipeline.constraints import keeps
from reward_pipeline.conversations import PROMPT_SHARE, encode, encode_prompt
from reward_pipeline.evaluator import RewardModelEvaluator, check_templates, trained_scale
from reward_pipeline.files import InputError, json_lines, rounded, write_checksums, write_text
from reward_pipeline.form import COUNTS, form_counts, form_differences, form_margins
from reward_pipeline.models import weights_digest
from reward_pipeline.plots import plot_before_and_after, plot_drift, plot_steps
from reward_pipeline.processes import is_first_process
from reward_pipeline.reward_functions import RewardFunction, function_rewards
from reward_pipeline.rollouts import Answers
from reward_pipeline.sampling import PolicyPrompt
from reward_pipeline.statistics import adjusted_mean, bootstrap_interval, rate_interval, wilcoxon_p, wins

SCALE_PAIRS = 256  # of the validation split, for the standard deviation of a judge that was not trained here
SIGNIFICANT_DIGITS = 3  # of p-values, which four decimals would round to 0
WHEN = ("before", "after")
# Who compares answers: the judge of the training, another one, a reward function; with what stands before its figures.
OPINIONS = {"reward": "", "second_judge": "second_judge_", "function": "function_"}
# of the comparison by one of them, what goes into `evaluation.json`
JUDGED = (
    *("reward_before", "reward_after", "reward_gain", "reward_gain_interval", "wilcoxon_p"),
    *("reward_gain_at_equal_form", "reward_gain_at_equal_form_interval", "win_rate", "win_rate_interval"),
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
    if scores.max() == scores.min():  # a deviation of 0 could be lost to rounding
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
    """The comparison of `compare_rewards` by a judge."""
    messages = [prompt.messages for prompt in prompts]
    # Not `get_reward_scores`, which refuses empty answers: a policy samples some.
    scores = judge.get_member_scores([*messages, *messages], [*before.texts, *after.texts], progress=True)
    old, new = judge.combine(scores).reshape(2, len(prompts))
    return compare_rewards(old, new, before, after)


def compare_by_function(
    name: str, function: RewardFunction, prompts: Sequence[PolicyPrompt], before: Answers, after: Answers
) -> dict[str, Any] | None:
    """The comparison of `compare_rewards` by a reward function of that name; None if it is applicable to no answer.

    A function of constraints has nothing to say of prompts without any, and a gain of 0 would be said of them.
    """
    rewards = [function_rewards(name, function, prompts, side.texts) for side in (before, after)]
    if all(reward is None for side in rewards for reward in side):
        return None
    old, new = (np.array([reward or 0.0 for reward in side]) for side in rewards)
    return compare_rewards(old, new, before, after)


def compare_rewards(old: np.ndarray, new: np.ndarray, before: Answers, after: Answers) -> dict[str, Any]:
    """What becomes of the rewards of both answers to each of N prompts.

    The gain at equal form is the part that no change of form explains: the intercept of a regression of the differences
    in reward between both answers to a prompt on their differences in the counts of `form.COUNTS`.

    Args:
        old, new: (N,) rewards.

    Returns:
        `rewards_before`, `rewards_after`, (N,) each, and the figures that `evaluation` describes.
    """
    won = wins(new, old)
    at_equal_form, interval = adjusted_mean(new - old, form_differences(after.texts, before.texts))
    return {
        "rewards_before": old,
        "rewards_after": new,
        "reward_before": float(old.mean()),
        "reward_after": float(new.mean()),
        "reward_gain": float((new - old).mean()),
        "reward_gain_interval": bootstrap_interval(new - old),
        "wilcoxon_p": wilcoxon_p(new - old),
        "reward_gain_at_equal_form": at_equal_form,
        "reward_gain_at_equal_form_interval": interval,
        "win_rate": float(won.mean()),
        "win_rate_interval": rate_interval(won),
    }


def mean_change(name: str, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Means of a figure of N pairs of answers, and the mean difference with its interval, by their names."""
    return {
        f"{name}_before": float(before.mean()),
        f"{name}_after": float(after.mean()),
        f"{name}_gain": float((after - before).mean()),
        f"{name}_gain_interval": bootstrap_interval(after - before),
    }


def form_drift(before: Sequence[str], after: Sequence[str], form_model: Mapping[str, float]) -> dict[str, Any]:
    """How the form of N answers changed.

    Returns:
        The form model's score, as `mean_change` gives it; `form_counts`, for each of `form.COUNTS` its mean and the
        number of answers in which it is not 0, before and after.
    """
    counts = [np.array([form_counts(text) for text in texts]) for texts in (before, after)]
    each = {
        name: {
            **{when: float(side[:, column].mean()) for when, side in zip(WHEN, counts, strict=True)},
            **{f"answers_{when}": int((side[:, column] > 0).sum()) for when, side in zip(WHEN, counts, strict=True)},
        }
        for column, name in enumerate(COUNTS)
    }
    scores = (form_margins(form_model, side) for side in counts)
    return mean_change("form_score", *scores) | {"form_counts": each}


def constraint_figures(
    prompts: Sequence[PolicyPrompt],
    asked: tuple[Answers, Answers],
    plain_prompts: Sequence[PolicyPrompt],
    plain: tuple[Answers, Answers],
) -> dict[str, Any]:
    """Whether answers before and after keep constraints, and whether they would without being asked.

    A policy that writes less keeps more of them by chance ("at most 20 words"). What it reads of a constraint is the
    difference to its answer to the same prompt without.

    Args:
        prompts: N, each with its constraint; asked: the answers to them.
        plain_prompts: among them the same, by their `place`, without a constraint; plain: the answers to them.

    Returns:
        `constraint_n`; `constraint_pass`, `constraint_unasked` and, of their differences, `constraint_read`, as
        `mean_change` gives them; `constraint_kinds`: `n`, and of either the shares `before` and `after`, by kind.
    """
    names = ("constraint_pass", "constraint_unasked", "constraint_read")
    if not prompts:
        nothing = {f"{name}_{what}": None for name in names for what in (*WHEN, "gain", "gain_interval")}
        return {"constraint_n": 0, **nothing, "constraint_kinds": {}}
    constraints = [prompt.constraint for prompt in prompts if prompt.constraint]

    def kept(texts: Sequence[str]) -> np.ndarray:
        """1 or 0 for each prompt, float64."""
        return np.array([float(keeps(*each)) for each in zip(constraints, texts, strict=True)])

    passed = [kept(side.texts) for side in asked]
    plain_texts = [dict(zip((prompt.place for prompt in plain_prompts), side.texts, strict=True)) for side in plain]
    unasked = [kept([texts[prompt.place] for prompt in prompts]) for texts in plain_texts]
    read = [both - alone for both, alone in zip(passed, unasked, strict=True)]
    shares = dict(zip((*WHEN, "unasked_before", "unasked_after"), (*passed, *unasked), strict=True))
    kinds = np.array([constraint.kind for constraint in constraints])
    each = {
        str(kind): {
            "n": int((kinds == kind).sum()),
            **{name: float(side[kinds == kind].mean()) for name, side in shares.items()},
        }
        for kind in np.unique(kinds)
    }
    changes: dict[str, Any] = {}
    for name, sides in zip(names, (passed, unasked, read), strict=True):
        changes |= mean_change(name, *sides)
    return {"constraint_n": len(prompts), **changes, "constraint_kinds": each}


def evaluation(
    before: Answers, after: Answers, opinions: Mapping[str, dict[str, Any] | None], form_model: Mapping[str, float]
) -> dict[str, Any]:
    """Content of `evaluation.json`, from the answers and what `OPINIONS` make of them.

    Args:
        opinions: of `compare_rewards`, by the names of `OPINIONS`; None for one that is not there.
        form_model: weights of `form.fit_form_model`.

    Returns:
        By the training judge: `n`, `reward_before`, `reward_after`, `reward_gain` and its paired bootstrap 95 %
        interval, `wilcoxon_p`, `reward_gain_at_equal_form` and its interval, `win_rate` against SFT (ties half) and its
        interval; the same with `second_judge_` in front by the second judge, with `function_` by the reward function;
        None without one, or where it is applicable to no answer. Of the texts: mean lengths in tokens and
        `length_ratio`; `distinct3` before and after, of each pair of answers cut to equal length, and
        `distinct3_ratio`; `repetition` and `ended` before and after; mean `kl` of the policy's answers to the reference
        in nats; and what `form_drift` says.
    """
    texts: dict[str, float] = {}
    equal = cut_to_equal_words(before.texts, after.texts)
    for when, each, cut in zip(WHEN, (before, after), equal, strict=True):
        texts |= {
            f"length_{when}": float(each.lengths.mean()),
            f"distinct3_{when}": distinct(cut),
            f"repetition_{when}": repetition(each.texts),
            f"ended_{when}": float(each.ended.mean()),
        }
    return {
        "n": len(before.texts),
        **{
            f"{prefix}{name}": judged[name] if (judged := opinions[who]) else None
            for who, prefix in OPINIONS.items()
            for name in JUDGED
        },
        **texts,
        "length_ratio": texts["length_after"] / texts["length_before"],
        "distinct3_ratio": texts["distinct3_after"] / texts["distinct3_before"],
        "kl": float(after.kl.mean()),
        **form_drift(before.texts, after.texts, form_model),
    }


def rounded_evaluation(results: dict[str, Any]) -> dict[str, Any]:
    """The results with four decimals, p-values with three significant digits."""
    p_values = {name: value for name, value in results.items() if name.endswith("wilcoxon_p") and value is not None}
    return rounded(results) | {name: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for name, value in p_values.items()}


class Outcome(NamedTuple):
    """All that is known of a policy."""

    before: Answers  # of the SFT model
    after: Answers
    opinions: dict[str, dict[str, Any] | None]  # of `compare_rewards`, by the names of `OPINIONS`
    results: dict[str, Any]  # content of `evaluation.json`
    samples: list[dict[str, Any]]  # of `sample_rows`
    constrained: list[dict[str, Any]]  # the same of the prompts with constraints


def outcome(
    prompts: Sequence[PolicyPrompt],
    answers: tuple[Answers, Answers],
    constrained: Sequence[PolicyPrompt],
    constrained_answers: tuple[Answers, Answers],
    judge: RewardModelEvaluator | None,
    second_judge: RewardModelEvaluator | None,
    function: tuple[str, RewardFunction] | None,
    form_model: Mapping[str, float],
) -> Outcome:
    """Answers before and after, to prompts as they are and with constraints, become figures.

    Args:
        function: a reward function with its name.
        form_model: weights of `form.fit_form_model`.
    """
    opinions = {
        "reward": compare_answers(judge, prompts, *answers) if judge else None,
        "second_judge": compare_answers(second_judge, prompts, *answers) if second_judge else None,
        "function": compare_by_function(*function, prompts, *answers) if function else None,
    }
    return Outcome(
        *answers,
        opinions,
        evaluation(*answers, opinions, form_model)
        | constraint_figures(constrained, constrained_answers, prompts, answers),
        sample_rows(prompts, *answers, opinions),
        sample_rows(constrained, *constrained_answers, {}),
    )


def sample_rows(
    prompts: Sequence[PolicyPrompt],
    before: Answers,
    after: Answers,
    opinions: Mapping[str, dict[str, Any] | None],
) -> list[dict[str, Any]]:
    """A row for each prompt, with both answers, their rewards, and whether they keep its constraint."""
    rows = []
    for number, prompt in enumerate(prompts):
        row: dict[str, Any] = {
            "prompt": prompt.messages,
            "before": before.texts[number],
            "after": after.texts[number],
        }
        for name, result in opinions.items():
            if result:
                row |= {f"{name}_{when}": float(result[f"rewards_{when}"][number]) for when in WHEN}
        if prompt.constraint:
            row |= prompt.constraint._asdict()
            row |= {f"kept_{when}": keeps(prompt.constraint, row[when]) for when in WHEN}
        rows.append(row)
    return rows


def write_policy_results(
    directory: Path, outcome: Outcome, settings: dict[str, Any], log: Sequence[dict[str, Any]]
) -> None:
    """Complete a saved policy with its figures, samples, settings, log, plots and card.

    Args:
        settings: resolved settings of the run.
        log: an entry an update.
    """
    plots, results = directory / "plots", outcome.results
    plots.mkdir()
    plot_steps(log, plots / "training.png")
    judged = next(filter(None, outcome.opinions.values()), None)
    plot_before_and_after(outcome.before, outcome.after, judged, plots / "before_and_after.png")
    plot_drift(results, plots / "drift.png")
    for name, content in {"evaluation": rounded_evaluation(results), "settings": settings}.items():
        write_text(directory / f"{name}.json", json.dumps(content, indent=2) + "\n")
    for name, lines in {"samples": outcome.samples, "constraints": outcome.constrained, "metrics": log}.items():
        write_text(directory / f"{name}.jsonl", json_lines(lines))
    write_text(directory / "samples.md", samples_page(outcome.samples, outcome.constrained))
    write_text(directory / "README.md", policy_card(results, settings, log))
    write_checksums(directory)
