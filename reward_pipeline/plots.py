"""Figures become pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reward_pipeline.pair_metrics import Columns
from reward_pipeline.rollouts import Answers
from reward_pipeline.statistics import TIE

PLOTTED_CATEGORIES = 20  # at most, the largest ones
MARGIN_BINS = 20  # on each side of 0
LENGTH_BINS = 60
# The line that every accuracy is seen against.
CHANCE: dict[str, Any] = {"y": 0.5, "color": "gray", "linestyle": ":", "linewidth": 1, "label": "chance"}

MEASURES = {"log_characters", "log_words", "log_lines", "distinct_words"}  # counts of form that every answer has


def plot_evaluation(columns: Columns, metrics: dict[str, Any], directory: Path) -> list[str]:
    """Draw the figures of `pair_metrics`; returns the names of the files written."""
    sure = metrics["with_form"] or metrics  # a training with the form term made the sum a probability
    figures = {
        "margins.png": plot_margins(columns, metrics),
        "reliability.png": plot_reliability(
            sure["reliability"], sure["ece"], "with form" if metrics["with_form"] else ""
        ),
        "reward_against_length.png": plot_against_length(columns),
        "accuracy_by_length.png": plot_groups(metrics["by_length"], "length of the longer answer (characters)"),
    }
    if metrics["by_rating_gap"]:
        figures["accuracy_by_rating_gap.png"] = plot_groups(metrics["by_rating_gap"], "rating gap (points)")
    if metrics["by_category"]:
        largest = sorted(metrics["by_category"], key=lambda each: each["n"], reverse=True)[:PLOTTED_CATEGORIES]
        figures["accuracy_by_category.png"] = plot_groups(largest, "category")
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=110)
    return list(figures)


def plot_margins(columns: Columns, metrics: dict[str, Any]) -> Figure:
    """Distribution of the margins; the share on the right of 0, with half of the ties, is the accuracy."""
    margins = columns["chosen_reward"] - columns["rejected_reward"]
    right = margins > TIE
    widest = max(float(np.abs(margins).max()), TIE)
    # 0 is an edge, so that no bar stands on both sides of it.
    edges = np.linspace(-widest, widest, 2 * MARGIN_BINS + 1).tolist()
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    sides = {"right": right, "wrong, or a tie": ~right}
    labels = [f"{name}: {inside.sum():,} pairs" for name, inside in sides.items()]
    axes.hist([margins[inside] for inside in sides.values()], edges, stacked=True, label=labels)
    axes.axvline(0, color="black", linewidth=1)
    axes.set(
        xlabel="margin: reward of the chosen minus that of the rejected answer",
        ylabel="pairs",
        title=f"Margins, accuracy {metrics['accuracy']:.3f}",
    )
    axes.legend()
    return figure


def plot_reliability(bins: Sequence[dict[str, Any]], ece: float, of_what: str = "") -> Figure:
    """Accuracy against confidence with intervals; on the diagonal the model knows how sure it may be."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", linewidth=1, label="calibrated")
    axes.axhline(**CHANCE)
    draw_accuracies(axes, [each["confidence"] for each in bins], bins, fmt="o-")
    axes.set(
        xlabel="confidence, sigmoid(|margin|)",
        ylabel="accuracy (share of pairs)",
        title=f"Calibration {of_what}".strip() + f", ECE {ece:.3f}",
    )
    axes.legend()
    return figure


def plot_groups(groups: Sequence[dict[str, Any]], label: str) -> Figure:
    """Accuracy of each group with intervals, beside chance and the group's longer-wins baseline."""
    figure = Figure(figsize=(max(5, 1.3 * len(groups)), 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(groups))
    draw_accuracies(axes, places, groups, fmt="o")
    baselines = [each["longer_wins"] for each in groups]
    axes.hlines(baselines, places - 0.4, places + 0.4, color="tab:orange", linewidth=1.5, label="longer wins")
    axes.axhline(**CHANCE)
    # Names come from the data, and `$x$` in one of them is no formula.
    axes.set_xticks(places, [f"{each['group']}\nn = {each['n']:,}" for each in groups], parse_math=False)
    axes.set(xlabel=label, ylabel="accuracy (share of pairs)", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    return figure


def draw_accuracies(axes: Axes, places: Any, groups: Sequence[dict[str, Any]], fmt: str) -> None:
    """Accuracy of each group with its interval over prompts; no bar where there is none."""
    accuracies = np.array([each["accuracy"] for each in groups])
    bounds = np.array([each["accuracy_interval"] or [math.nan, math.nan] for each in groups]).T
    axes.errorbar(places, accuracies, np.abs(bounds - accuracies), fmt=fmt, capsize=3, label="reward model")


def plot_against_length(columns: Columns) -> Figure:
    """Reward against length, and within pairs margin against difference in length."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    answers, differences = figure.subplots(1, 2)
    for side in ("chosen", "rejected"):
        answers.plot(columns[f"{side}_length"], columns[f"{side}_reward"], ".", markersize=3, alpha=0.5, label=side)
    answers.set(xlabel="length (characters)", ylabel="reward", xscale="symlog", title="Reward and length")
    answers.legend(markerscale=4)
    extra = columns["chosen_length"] - columns["rejected_length"]
    differences.plot(extra, columns["chosen_reward"] - columns["rejected_reward"], ".", markersize=3, alpha=0.5)
    differences.axhline(0, color="gray", linewidth=1)
    differences.axvline(0, color="gray", linewidth=1)
    differences.set(
        xlabel="characters that the chosen answer is longer",
        ylabel="margin",
        xscale="symlog",
        title="Margin and difference in length",
    )
    return figure


def plot_lengths(lengths: Mapping[str, np.ndarray], max_length: int, path: Path) -> None:
    """Histogram of the lengths of whole conversations against the limit.

    Args:
        lengths: (N,) tokens of prompt, answer and template together, before the cut, for "chosen" and "rejected".
        max_length: the limit in tokens.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    every = np.concatenate(list(lengths.values()))
    last = max(float(np.percentile(every, 99)), max_length) * 1.02  # a few very long ones would hide all the others
    for label, each in lengths.items():
        axes.hist(each, bins=np.linspace(0, last, LENGTH_BINS).tolist(), histtype="step", label=label)
    axes.axvline(max_length, color="black", linestyle="--", linewidth=1, label=f"max_length {max_length}")
    axes.set(
        xlabel="tokens of the whole conversation before the cut (up to the 99th percentile)",
        ylabel="conversations",
        title=f"Lengths: {(every > max_length).mean():.1%} are over the limit",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_curves(history: Sequence[Mapping[str, float]], baselines: Mapping[str, float | None], path: Path) -> None:
    """Loss, accuracy, learning rate and gradient norm against updates.

    Args:
        history: log entries of the training; each has `step` and some of the figures.
        baselines: accuracies on the validation pairs by their names; None is left out.
    """
    panels = {
        "loss (nats)": {"loss": "train", "eval_loss": "validation"},
        "accuracy (share of pairs)": {"accuracy": "train", "eval_accuracy": "validation"},
        "learning rate": {"learning_rate": "learning rate"},
        "gradient norm": {"grad_norm": "before clipping"},
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    panes = dict(zip(panels, figure.subplots(2, 2).flat, strict=True))
    for label, series in panels.items():
        for key, name in series.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            panes[label].plot(*zip(*points, strict=True) if points else ((), ()), marker=".", label=name)
        panes[label].set(xlabel="updates", ylabel=label)
    # The Bradley-Terry loss of equal rewards: above it the model knows less than nothing.
    panes["loss (nats)"].axhline(math.log(2), color="gray", linestyle=":", linewidth=1, label="ln 2, equal rewards")
    accuracy = panes["accuracy (share of pairs)"]
    for (name, value), color in zip(baselines.items(), ("tab:green", "tab:red"), strict=False):
        if value is not None:
            accuracy.axhline(value, color=color, linestyle="--", linewidth=1, label=name)
    accuracy.axhline(**CHANCE)
    for axes in panes.values():
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_steps(log: Sequence[dict[str, float]], path: Path) -> None:
    """Reward, form, KL, length, share that ended and entropy against steps."""
    panels = {
        "reward": {"score": "score", "judge": "reward model", "function": "function", "baseline": "baseline"},
        "KL to the SFT model (nats)": {"kl": "whole completion"},
        "length (tokens)": {"length": "mean"},
        "form model's score (nats)": {"form_score": "mean"},
        "share that ended": {"ended": "mean"},
        "entropy (nats per token)": {"entropy": "mean"},
    }
    figure = Figure(figsize=(14, 6), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for key, label in series.items():
            if key in log[0]:
                axes.plot([entry["step"] for entry in log], [entry[key] for entry in log], label=label)
        axes.set(title=title, xlabel="updates")
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_before_and_after(before: Answers, after: Answers, judged: dict[str, Any] | None, path: Path) -> None:
    """Distributions of length on the evaluation prompts, and of reward, if there is one."""
    drawn = {"length (tokens)": (before.lengths, after.lengths)}
    if judged:
        drawn = {"reward (standard deviations)": (judged["rewards_before"], judged["rewards_after"])} | drawn
    figure = Figure(figsize=(5 * len(drawn), 4), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        edges = np.histogram_bin_edges(np.concatenate(values), bins=30)
        for name, each in zip(("SFT", "aligned"), values, strict=True):
            axes.hist(each, edges, alpha=0.5, label=name)
        axes.set(xlabel=label, ylabel="answers")
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_drift(results: Mapping[str, Any], path: Path) -> None:
    """How much of the gain is form: gains with and without it, and in how many answers each mark of form stands."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    gains, shares = figure.subplots(1, 2)
    named = {
        "reward model": "reward_gain",
        "at equal form": "reward_gain_at_equal_form",
        "second judge": "second_judge_reward_gain",
        "second judge,\nat equal form": "second_judge_reward_gain_at_equal_form",
        "form model": "form_score_gain",
    }
    drawn = {label: name for label, name in named.items() if results.get(name) is not None}
    values = np.array([results[name] for name in drawn.values()])
    bounds = np.array([results[f"{name}_interval"] or [math.nan] * 2 for name in drawn.values()]).T
    gains.errorbar(values, range(len(drawn)), xerr=np.abs(bounds - values), fmt="o", capsize=3)
    gains.axvline(0, color="gray", linewidth=1)
    gains.set_yticks(range(len(drawn)), drawn)
    gains.invert_yaxis()
    gains.set(xlabel="gain (rewards: standard deviations; form model: nats)", title="Gain over SFT, 95 % intervals")
    marks = [name for name, each in results["form_counts"].items() if name not in MEASURES]
    places = np.arange(len(marks))
    for offset, (when, label) in zip((-0.2, 0.2), (("before", "SFT"), ("after", "aligned")), strict=True):
        share = [results["form_counts"][name][f"answers_{when}"] / results["n"] for name in marks]
        shares.barh(places + offset, share, height=0.4, label=label)
    shares.set_yticks(places, [name.replace("_", " ") for name in marks])
    shares.invert_yaxis()
    shares.set(xlabel="share of the answers", title="Marks of form")
    shares.legend()
    figure.savefig(path, dpi=120)
