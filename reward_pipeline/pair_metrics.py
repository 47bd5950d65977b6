"""Scored pairs become figures."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas
import scipy.special
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from reward_pipeline.conversations import Messages, response_text
from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.form import author_margins, form_differences, form_margins, form_scores, response_length
from reward_pipeline.pairs import pair_keys
from reward_pipeline.processes import is_first_process
from reward_pipeline.reading import reading_partners
from reward_pipeline.statistics import bootstrap_interval, rate_interval, spearman, wins

GROUPS = 4  # groups of equal size for accuracy by length and by rating gap
CONFIDENCE_BINS = 10  # of equal width between 0.5 and 1, for the calibration error
# Arrays of equal length, one entry a pair: "pairs" (name of the source), "place" (its row there), "prompt", "chosen",
# "rejected" (texts), "prompt_key" (hash of the prompt), "chosen_reward", "rejected_reward", "chosen_length",
# "rejected_length" (characters), "chosen_rating", "rejected_rating", "rating_gap" (NaN where unknown), "category" (""
# where unknown), "form_margin" (of the form model, NaN where none is known), "chosen_author", "rejected_author" (""
# where unknown), "author_margin" (by their strengths, NaN where unknown), "prompt_cut", "response_cut" (beside or in
# either answer). Of `score_pairs` also "chosen_form", "rejected_form" (the form term beside the rewards, NaN where the
# training had none), "shuffled_chosen_reward", "shuffled_rejected_reward" (under another prompt) and "other_reward"
# (under the own prompt, of another one's chosen answer), NaN where not checked.
Columns = dict[str, np.ndarray]
ANSWERS = {  # the rewards of a pair, and whether the answer is a chosen or a rejected one
    **{"chosen_reward": "chosen", "rejected_reward": "rejected"},
    **{"shuffled_chosen_reward": "chosen", "shuffled_rejected_reward": "rejected", "other_reward": "chosen"},
}


def prompt_text(messages: Messages) -> str:
    """A prompt for people to read: the text of a single turn, of several ones each after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def text_columns(
    pairs: Dataset,
    name: str,
    form_model: Mapping[str, float] | None = None,
    author_strengths: Mapping[str, float] | None = None,
) -> Columns:
    """What is known of N pairs before they are scored.

    Args:
        form_model: weights of `form.fit_form_model`, fitted to pairs with other prompts.
        author_strengths: of `form.fit_authors`, likewise.
    """
    chosen, rejected = ([response_text(answer) for answer in pairs[side]] for side in ("chosen", "rejected"))
    ratings = [np.array(pairs[f"{side}_rating"], dtype=float) for side in ("chosen", "rejected")]
    authors = [np.array(pairs[f"{side}_author"], dtype=object) for side in ("chosen", "rejected")]
    return {
        "pairs": np.array([name] * len(pairs)),
        "place": np.array(pairs["place"]),
        # As objects: NumPy's own strings would give every text the width of the longest.
        "prompt": np.array([prompt_text(messages) for messages in pairs["prompt"]], dtype=object),
        "chosen": np.array(chosen, dtype=object),
        "rejected": np.array(rejected, dtype=object),
        "prompt_key": np.array([pair_keys(pair)["prompt_key"] for pair in pairs]),
        "chosen_length": np.array([response_length(text) for text in chosen]),
        "rejected_length": np.array([response_length(text) for text in rejected]),
        "chosen_rating": ratings[0],
        "rejected_rating": ratings[1],
        "rating_gap": ratings[0] - ratings[1],
        "category": np.array(pairs["category"]),
        "form_margin": (
            form_margins(form_model, form_differences(chosen, rejected)) if form_model else np.full(len(pairs), np.nan)
        ),
        "chosen_author": authors[0],
        "rejected_author": authors[1],
        "author_margin": author_margins(author_strengths or {}, *authors),
    }


def score_pairs(
    evaluator: RewardModelEvaluator, pairs: Dataset, name: str, part: np.ndarray | None = None
) -> tuple[Columns, np.ndarray]:
    """Score both answers of N pairs, and what `reading_partners` checks of them.

    Args:
        part: (N,) rows of the pairs to score, by default all; their partners may be any.

    Returns:
        The columns (what is cut is told by the first member's tokenizer and length), and the (M, N) margins of the
        evaluator's M members.
    """
    config = evaluator.members[0].model.config
    fitted = (getattr(config, each, None) for each in ("form_model", "author_strengths"))  # to its own training pairs
    columns, prompts = text_columns(pairs, name, *fitted), list(pairs["prompt"])
    own = np.arange(len(pairs)) if part is None else part
    partners = reading_partners(columns["prompt_key"], columns["chosen"], columns["chosen_length"])
    shuffled, matched = (each[own] for each in partners)
    # A row a reward: which pair the prompt is from, and which one the answer. All are scored at once, so that those
    # with a common prompt come together.
    asked, answered = np.array([own, own, shuffled, shuffled, own]), np.array([own, own, own, own, matched])
    answers = np.array([columns[side][rows] for side, rows in zip(ANSWERS.values(), answered, strict=True)])
    known = (asked >= 0) & (answered >= 0)
    scores, cuts = evaluator.get_member_scores_and_cuts(
        [prompts[row] for row in asked[known]], answers[known].tolist(), progress=is_first_process()
    )
    rewards = np.full(known.shape, np.nan)
    rewards[known] = evaluator.combine(scores)
    n = len(own)  # of the first two rows all are known
    # A prompt may be cut beside one answer only, where the whole fits with the other one.
    prompt_cut, response_cut = cuts[0, : 2 * n].reshape(2, n, 2).any(axis=0).T
    columns = {key: values[own] for key, values in columns.items()} | dict(zip(ANSWERS, rewards, strict=True))
    columns |= {f"{side}_form": form_terms(evaluator, columns[side]) for side in ("chosen", "rejected")}
    return columns | {"prompt_cut": prompt_cut, "response_cut": response_cut}, scores[:, :n] - scores[:, n : 2 * n]


def form_terms(evaluator: RewardModelEvaluator, responses: Iterable[str]) -> np.ndarray:
    """(N,) what the form term adds to the reward of an answer, of an ensemble the mean; NaN where a member has none."""
    configs, texts = [member.model.config for member in evaluator.members], list(responses)
    if not all(getattr(config, "form_term", False) and config.form_model for config in configs):
        return np.full(len(texts), np.nan)
    return np.mean([form_scores(config.form_model, texts) for config in configs], axis=0)


def with_form(columns: Columns) -> Columns | None:
    """The columns with the form term as a part of the rewards; None where the training had none.

    Without those of the checks of reading, which are about the model.
    """
    terms = [columns.get(f"{side}_form") for side in ("chosen", "rejected")]
    if any(term is None or np.isnan(term).any() for term in terms):
        return None
    whole = {f"{side}_reward": columns[f"{side}_reward"] + columns[f"{side}_form"] for side in ("chosen", "rejected")}
    checks = [name for name in ANSWERS if name not in whole]
    return {name: columns[name] for name in columns if name not in (*checks, "chosen_form", "rejected_form")} | whole


def score_together(evaluator: RewardModelEvaluator, pairs: Dataset, name: str) -> Columns:
    """The columns of `score_pairs` with the pairs divided among the processes: each is scored once, by one of them.

    All processes have to call it; all get the columns of all pairs, in their order.
    """
    state = PartialState()
    mine = np.array_split(np.arange(len(pairs)), state.num_processes)[state.process_index]
    return join_columns(gather_object([score_pairs(evaluator, pairs, name, mine)[0]] if len(mine) else []))


def join_columns(tables: Sequence[Columns]) -> Columns:
    """The pairs of several sources as one."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def accuracy_with_interval(pair_wins: np.ndarray, prompt_key: np.ndarray) -> dict[str, Any]:
    """n, mean of the wins (None without pairs) and its 95 % interval over prompts (None with fewer than two).

    Pairs that share a prompt are won or lost together: intervals that take them as independent hold the truth in half
    to four fifths of the cases instead of 95 %.
    """
    return {
        "n": len(pair_wins),
        "accuracy": float(pair_wins.mean()) if len(pair_wins) else None,
        "accuracy_interval": rate_interval(pair_wins, prompt_key),
    }


def reliability(margins: np.ndarray, prompt_key: np.ndarray, bins: int = CONFIDENCE_BINS) -> list[dict[str, Any]]:
    """How often the preferred answer is the chosen one, by the confidence sigmoid(|margin|) of the preference.

    Returns:
        For each non-empty of `bins` equal parts of [0.5, 1]: mean confidence and `accuracy_with_interval` (ties half).
    """
    confidence, pair_wins = scipy.special.expit(np.abs(margins)), wins(margins)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[place == number].mean()),
            **accuracy_with_interval(pair_wins[place == number], prompt_key[place == number]),
        }
        for number in np.unique(place)
    ]


def calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Expected calibration error (arXiv 1706.04599): mean gap of confidence and accuracy, weighted by n."""
    total = sum(each["n"] for each in bins)
    return sum(each["n"] / total * abs(each["confidence"] - each["accuracy"]) for each in bins)


def quantile_groups(values: np.ndarray, count: int = GROUPS) -> tuple[np.ndarray, list[str]]:
    """Split values into at most `count` groups of about equal size.

    Returns:
        (N,) number of each value's group, and the groups' bounds in words, in ascending order.
    """
    # Rounded, since differences of ratings that are equal on paper may not be equal in binary.
    group, edges = pandas.qcut(values.round(6), count, labels=False, retbins=True, duplicates="drop")
    labels = [f"{edge:.0f}" if edges[-1] >= 100 else f"{round(edge, 2):g}" for edge in edges]
    if len(edges) == 1:  # all values are alike, and there is no interval for `qcut` to put them into
        return np.zeros(len(values), dtype=int), labels
    return group, [f"{low} to {high}" for low, high in itertools.pairwise(labels)]


def accuracy_by(
    group: np.ndarray, names: Sequence[str], pair_wins: np.ndarray, longer: np.ndarray, prompt_key: np.ndarray
) -> list[dict[str, Any]]:
    """`accuracy_with_interval` and the longer-wins baseline of every non-empty group.

    Args:
        group: (N,) place of each pair's group in `names`; -1 for a pair of none.
    """
    return [
        {
            "group": name,
            **accuracy_with_interval(pair_wins[group == number], prompt_key[group == number]),
            "longer_wins": float(longer[group == number].mean()),
        }
        for number, name in enumerate(names)
        if (group == number).any()
    ]


def pair_metrics(columns: Columns) -> dict[str, Any]:
    """Figures for N scored pairs.

    Returns:
        - `n`, `prompts` (different ones), `accuracy` (ties half), `accuracy_interval`, `ties`
        - `longer_wins`, accuracy of preferring the answer with more characters; `gain_over_longer_wins` and its paired
          interval
        - `shorter_chosen_n`, `shorter_chosen_accuracy`, `shorter_chosen_interval`: pairs whose chosen answer is the
          shorter one
        - `form_wins`, accuracy of the form model; `gain_over_form` and its paired interval; `form_wrong_n`,
          `form_wrong_accuracy`, `form_wrong_interval`: pairs that the form model gets wrong; `form_even_n`, …: the
          quarter with its smallest margins, which it can not tell apart; `spearman_margin_form`. All None (and the
          numbers 0) where no form model is known
        - `author_n`, pairs with a known author margin, and over these `author_wins`, accuracy of preferring the
          stronger author; `gain_over_authors` and its paired interval. All None (and 0) where there are none
        - `shuffled_prompt_accuracy` (ties half) where both answers are scored under another pair's prompt;
          `shuffled_prompt_loss`, accuracy on the same `shuffled_prompt_n` pairs under their own prompts minus that, and
          its paired interval
        - `own_prompt_accuracy` (ties half) of preferring the chosen answer to another prompt's that is nearest in
          length; `own_prompt_interval`, `own_prompt_n`. All None (and the numbers 0) where nothing was checked
        - `mean_margin`; `brier`, mean of (1 - sigmoid(margin))^2; `ece` (`calibration_error`), `reliability` (its bins)
        - `reward_mean`, `reward_std` of all 2 N answers; `spearman_reward_length` over these, and
          `spearman_margin_length` of the differences within a pair
        - `by_rating_gap`, `by_length` (characters of the longer answer), `by_category`: see `accuracy_by`; empty where
          the pairs do not say
        - `cut_share` of pairs with a cut prompt, or with a cut answer
        - `with_form`: all of this for the rewards with the form term, None where the training had none; the confidences
          of a model that was trained with it are those of the sum

        All intervals are 95 % and over prompts: a bootstrap that draws whole prompts, None for fewer than two.
    """
    chosen, rejected, whole = columns["chosen_reward"], columns["rejected_reward"], with_form(columns)
    margins, pair_wins = chosen - rejected, wins(chosen, rejected)
    extra, prompt_key = columns["chosen_length"] - columns["rejected_length"], columns["prompt_key"]
    longer = wins(extra)
    shorter = accuracy_with_interval(pair_wins[extra < 0], prompt_key[extra < 0])
    rewards = np.concatenate([chosen, rejected])
    lengths = np.concatenate([columns["chosen_length"], columns["rejected_length"]])
    bins = reliability(margins, prompt_key)
    return {
        **accuracy_with_interval(pair_wins, prompt_key),
        "prompts": len(np.unique(prompt_key)),
        "ties": int((pair_wins == 0.5).sum()),
        "longer_wins": float(longer.mean()),
        "gain_over_longer_wins": float((pair_wins - longer).mean()),
        "gain_over_longer_wins_interval": bootstrap_interval(pair_wins - longer, prompt_key),
        "shorter_chosen_n": shorter["n"],
        "shorter_chosen_accuracy": shorter["accuracy"],
        "shorter_chosen_interval": shorter["accuracy_interval"],
        **form_metrics(columns["form_margin"], margins, pair_wins, prompt_key),
        **author_metrics(columns["author_margin"], pair_wins, prompt_key),
        **reading_metrics(columns, pair_wins),
        "mean_margin": float(margins.mean()),
        "brier": float(np.mean(scipy.special.expit(-margins) ** 2)),
        "ece": calibration_error(bins),
        "reliability": bins,
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "spearman_reward_length": spearman(rewards, lengths),
        "spearman_margin_length": spearman(margins, extra),
        **breakdowns(columns, pair_wins, longer),
        "cut_share": {
            side: float(columns[f"{side}_cut"].mean()) for side in ("prompt", "response") if f"{side}_cut" in columns
        },
        "with_form": pair_metrics(whole) if whole else None,
    }


def form_metrics(
    form: np.ndarray, margins: np.ndarray, pair_wins: np.ndarray, prompt_key: np.ndarray
) -> dict[str, Any]:
    """What a model knows beyond the form model; see `pair_metrics`.

    Args:
        form, margins: (N,) margins of the form model, NaN where unknown, and of the model.
    """
    known = ~np.isnan(form)
    form, margins, pair_wins, prompt_key = form[known], margins[known], pair_wins[known], prompt_key[known]
    even = np.abs(form) <= (np.quantile(np.abs(form), 0.25) if len(form) else 0)
    names = ("form_wins", "gain_over_form", "gain_over_form_interval")
    figures: dict[str, Any] = dict(zip(names, paired_gain(form, pair_wins, prompt_key), strict=True))
    for name, chosen in (("form_wrong", wins(form) == 0), ("form_even", even)):
        part = accuracy_with_interval(pair_wins[chosen], prompt_key[chosen])
        figures |= {f"{name}_{key.removeprefix('accuracy_')}": value for key, value in part.items()}
    return figures | {"spearman_margin_form": spearman(margins, form) if len(form) else None}


def author_metrics(author: np.ndarray, pair_wins: np.ndarray, prompt_key: np.ndarray) -> dict[str, Any]:
    """What a model knows beyond who wrote the answers; see `pair_metrics`.

    Args:
        author: (N,) margins of the authors, NaN where unknown.
    """
    known = ~np.isnan(author)
    names = ("author_wins", "gain_over_authors", "gain_over_authors_interval")
    figures = paired_gain(author[known], pair_wins[known], prompt_key[known])
    return {"author_n": int(known.sum()), **dict(zip(names, figures, strict=True))}


def paired_gain(
    baseline: np.ndarray, pair_wins: np.ndarray, prompt_key: np.ndarray
) -> tuple[float | None, float | None, list[float] | None]:
    """Accuracy of a baseline with these (N,) margins, the gain over it and its interval; None without pairs."""
    if not len(baseline):
        return None, None, None
    baseline_wins = wins(baseline)
    difference = pair_wins - baseline_wins
    return float(baseline_wins.mean()), float(difference.mean()), bootstrap_interval(difference, prompt_key)


def reading_metrics(columns: Columns, pair_wins: np.ndarray) -> dict[str, Any]:
    """How much of the (N,) wins needs the prompt; see `pair_metrics`."""
    prompt_key, unknown = columns["prompt_key"], np.full(len(pair_wins), np.nan)  # benchmarks do not check it
    names = ("shuffled_chosen_reward", "shuffled_rejected_reward", "other_reward")
    chosen, rejected, other = (columns.get(name, unknown) for name in names)
    shuffled, own = ~np.isnan(chosen), ~np.isnan(other)
    shuffled_wins = wins(chosen[shuffled], rejected[shuffled])
    loss = pair_wins[shuffled] - shuffled_wins
    part = accuracy_with_interval(wins(columns["chosen_reward"][own], other[own]), prompt_key[own])
    return {
        "shuffled_prompt_n": len(loss),
        "shuffled_prompt_accuracy": float(shuffled_wins.mean()) if len(loss) else None,
        "shuffled_prompt_loss": float(loss.mean()) if len(loss) else None,
        "shuffled_prompt_loss_interval": bootstrap_interval(loss, prompt_key[shuffled]),
        **{f"own_prompt_{key.removeprefix('accuracy_')}": value for key, value in part.items()},
    }


def breakdowns(columns: Columns, pair_wins: np.ndarray, longer: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Accuracy by rating gap, by length and by category."""
    rated, named = ~np.isnan(columns["rating_gap"]), columns["category"] != ""
    gap, category = np.full(len(rated), -1), np.full(len(named), -1)
    gap_names: list[str] = []
    if rated.any():
        gap[rated], gap_names = quantile_groups(columns["rating_gap"][rated])
    length, length_names = quantile_groups(np.maximum(columns["chosen_length"], columns["rejected_length"]))
    category_names, category[named] = np.unique(columns["category"][named], return_inverse=True)
    outcome = (pair_wins, longer, columns["prompt_key"])
    return {
        "by_rating_gap": accuracy_by(gap, gap_names, *outcome),
        "by_length": accuracy_by(length, length_names, *outcome),
        "by_category": accuracy_by(category, category_names.tolist(), *outcome),
    }


def number(value: float | None) -> str:
    """A figure with three decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def gain(metrics: Mapping[str, Any], baseline: str) -> str:
    """Paired difference to "longer_wins", "form" or "authors" with its interval; a dash where that is not known."""
    value, bounds = metrics[f"gain_over_{baseline}"], metrics[f"gain_over_{baseline}_interval"]
    return difference(value, bounds)


def difference(value: float | None, bounds: Sequence[float] | None) -> str:
    """A paired difference with its interval; a dash where there is none."""
    return "–" if value is None else f"{value:+.3f} ({span(bounds)})"


def span(bounds: Sequence[float] | None) -> str:
    """An interval with three decimals; a dash where there is none."""
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def metrics_line(metrics: dict[str, Any]) -> str:
    """The main figures of `pair_metrics` in one line."""
    whole = metrics["with_form"]
    return (
        f"accuracy {metrics['accuracy']:.3f} (95 % interval {span(metrics['accuracy_interval'])}, "
        f"n = {metrics['n']:,}; longer wins: {metrics['longer_wins']:.3f}, "
        f"form model: {number(metrics['form_wins'])})"
        + (f"; with the form term {whole['accuracy']:.3f} ({span(whole['accuracy_interval'])})" if whole else "")
    )
